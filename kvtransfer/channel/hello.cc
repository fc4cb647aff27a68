#include "kvtransfer/channel/hello.h"

#include <cstring>

#include "common/base/status.h"
#include "kvtransfer/store/page_digest.h"
#include "kvtransfer/transport/frame.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {
namespace {

template <typename T>
void Append(std::string* out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out->append(bytes, sizeof(T));
}

void AppendText(std::string* out, const std::string& text) {
  Append(out, static_cast<uint16_t>(text.size()));
  out->append(text);
}

// Takes values from the front; false once anything was missing.
class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <typename T>
  T Take() {
    T value{};
    if (rest_.size() < sizeof(T)) {
      ok_ = false;
      return value;
    }
    std::memcpy(&value, rest_.data(), sizeof(T));
    rest_ = rest_.subspan(sizeof(T));
    return value;
  }

  std::string TakeText(size_t most = kMaxHelloText) {
    const auto size = Take<uint16_t>();
    if (size > most || size > rest_.size()) {
      ok_ = false;
      return "";
    }
    std::string text(reinterpret_cast<const char*>(rest_.data()), size);
    rest_ = rest_.subspan(size);
    return text;
  }

  bool Complete() const { return ok_ && rest_.empty(); }

 private:
  std::span<const std::byte> rest_;
  bool ok_ = true;
};

}  // namespace

std::string EncodeHello(const Hello& hello) {
  const KvLayout& layout = hello.shape.layout;
  std::string out;
  Append(&out, kKvProtocolVersion);
  Append(&out, kPageDigestVersion);
  for (const int value :
       {layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size,
        static_cast<int>(layout.dtype), hello.shape.num_blocks, hello.shape.first_head}) {
    Append(&out, static_cast<int32_t>(value));
  }
  AppendText(&out, hello.worker_id);
  AppendText(&out, hello.capability_digest);
  Append(&out, static_cast<uint16_t>(hello.transports.size()));
  for (const TransportOffer& offer : hello.transports) {
    AppendText(&out, offer.name);
    AppendText(&out, offer.advert);
  }
  return out;
}

absl::StatusOr<Hello> DecodeHello(std::span<const std::byte> payload) {
  Cursor cursor(payload);
  const auto version = cursor.Take<uint32_t>();
  if (payload.size() >= sizeof(version) && version != kKvProtocolVersion) {
    return FailedPrecondition("KV protocol version: here {}, peer {}", kKvProtocolVersion, version);
  }
  const auto digest_version = cursor.Take<uint32_t>();
  Hello hello;
  KvLayout& layout = hello.shape.layout;
  layout.num_layers = cursor.Take<int32_t>();
  layout.num_kv_heads = cursor.Take<int32_t>();
  layout.head_dim = cursor.Take<int32_t>();
  layout.block_size = cursor.Take<int32_t>();
  const auto dtype = cursor.Take<int32_t>();
  hello.shape.num_blocks = cursor.Take<int32_t>();
  hello.shape.first_head = cursor.Take<int32_t>();
  hello.worker_id = cursor.TakeText();
  hello.capability_digest = cursor.TakeText();
  const auto offers = cursor.Take<uint16_t>();
  for (size_t i = 0; i < offers && i < kMaxOffers; ++i) {
    TransportOffer& offer = hello.transports.emplace_back();
    offer.name = cursor.TakeText(kMaxTransportName);
    offer.advert = cursor.TakeText(kMaxAdvertBytes);
  }
  if (!cursor.Complete()) return InvalidArgument("malformed KV hello of {} bytes", payload.size());
  if (digest_version != kPageDigestVersion) {
    return FailedPrecondition("KV digest version: here {}, peer {}", kPageDigestVersion,
                              digest_version);
  }
  if (dtype < static_cast<int32_t>(DType::kFloat32) ||
      dtype > static_cast<int32_t>(DType::kFloat8E4M3)) {
    return InvalidArgument("KV hello: unknown dtype {}", dtype);
  }
  layout.dtype = static_cast<DType>(dtype);
  TANDEM_RETURN_IF_ERROR(ValidateHello(hello));
  return hello;
}

absl::Status ValidateHello(const Hello& hello) {
  TANDEM_RETURN_IF_ERROR(ValidateShape(hello.shape));
  if (hello.worker_id.empty()) {
    return InvalidArgument(
        "worker_id must not be empty: each end of a connection proves which worker it is");
  }
  if (hello.worker_id.size() > kMaxHelloText || hello.capability_digest.size() > kMaxHelloText) {
    return InvalidArgument("worker_id and capability_digest must have at most {} bytes",
                           kMaxHelloText);
  }
  if (hello.transports.size() > kMaxOffers) {
    return InvalidArgument("{} transports are more than {}", hello.transports.size(), kMaxOffers);
  }
  return absl::OkStatus();
}

absl::Status CheckCompatible(const Hello& receiver, const Hello& sender) {
  TANDEM_RETURN_IF_ERROR(
      CheckConvertible(receiver.shape, sender.shape, receiver.worker_id, sender.worker_id));
  const HeadRange wanted = receiver.shape.heads();
  const HeadRange held = sender.shape.heads();
  if (!held.Contains(wanted)) {
    // A transfer has one sender, so that one must have everything.
    return FailedPrecondition("KV heads: {} needs [{}, {}), {} has [{}, {})", receiver.worker_id,
                              wanted.begin, wanted.end(), sender.worker_id, held.begin, held.end());
  }
  if (receiver.capability_digest != sender.capability_digest) {
    return FailedPrecondition(
        "capability digest of {} and {} differ: model, dtype, quantization, block size or protocol "
        "version",
        receiver.worker_id, sender.worker_id);
  }
  return absl::OkStatus();
}

}  // namespace tandem::kvtransfer
