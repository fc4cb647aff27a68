#include "kvtransfer/channel/hello.h"

#include <cstring>

#include "common/base/status.h"
#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/transport/frame.h"

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

  std::string TakeText() {
    const auto size = Take<uint16_t>();
    if (size > kMaxHelloText || size > rest_.size()) {
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
  std::string out;
  Append(&out, kKvProtocolVersion);
  Append(&out, static_cast<int32_t>(hello.layout.num_layers));
  Append(&out, static_cast<int32_t>(hello.layout.num_kv_heads));
  Append(&out, static_cast<int32_t>(hello.layout.head_dim));
  Append(&out, static_cast<int32_t>(hello.layout.block_size));
  Append(&out, static_cast<int32_t>(hello.layout.dtype));
  Append(&out, static_cast<int32_t>(hello.num_blocks));
  AppendText(&out, hello.worker_id);
  AppendText(&out, hello.capability_digest);
  return out;
}

absl::StatusOr<Hello> DecodeHello(std::span<const std::byte> payload) {
  Cursor cursor(payload);
  const auto version = cursor.Take<uint32_t>();
  Hello hello;
  hello.layout.num_layers = cursor.Take<int32_t>();
  hello.layout.num_kv_heads = cursor.Take<int32_t>();
  hello.layout.head_dim = cursor.Take<int32_t>();
  hello.layout.block_size = cursor.Take<int32_t>();
  const auto dtype = cursor.Take<int32_t>();
  hello.num_blocks = cursor.Take<int32_t>();
  hello.worker_id = cursor.TakeText();
  hello.capability_digest = cursor.TakeText();
  if (!cursor.Complete()) return InvalidArgument("malformed KV hello of {} bytes", payload.size());
  if (version != kKvProtocolVersion) {
    return FailedPrecondition("KV protocol version: here {}, peer {}", kKvProtocolVersion, version);
  }
  if (dtype < static_cast<int32_t>(DType::kFloat32) ||
      dtype > static_cast<int32_t>(DType::kFloat16)) {
    return InvalidArgument("KV hello: unknown dtype {}", dtype);
  }
  hello.layout.dtype = static_cast<DType>(dtype);
  TANDEM_RETURN_IF_ERROR(ValidateHello(hello));
  return hello;
}

absl::Status ValidateHello(const Hello& hello) {
  TANDEM_RETURN_IF_ERROR(ValidateLayout(hello.layout));
  if (hello.num_blocks < 0 || static_cast<uint32_t>(hello.num_blocks) > kMaxOrdinals) {
    return InvalidArgument("num_blocks must be in [0, {}], got {}", kMaxOrdinals, hello.num_blocks);
  }
  if (hello.worker_id.size() > kMaxHelloText || hello.capability_digest.size() > kMaxHelloText) {
    return InvalidArgument("worker_id and capability_digest must have at most {} bytes",
                           kMaxHelloText);
  }
  return absl::OkStatus();
}

absl::Status CheckCompatible(const Hello& here, const Hello& peer) {
  const struct {
    const char* name;
    int here;
    int peer;
  } fields[] = {{"layers", here.layout.num_layers, peer.layout.num_layers},
                {"kv_heads", here.layout.num_kv_heads, peer.layout.num_kv_heads},
                {"head_dim", here.layout.head_dim, peer.layout.head_dim},
                {"block_size", here.layout.block_size, peer.layout.block_size}};
  for (const auto& field : fields) {
    if (field.here != field.peer) {
      return FailedPrecondition("KV {}: {} has {}, {} has {}", field.name, here.worker_id,
                                field.here, peer.worker_id, field.peer);
    }
  }
  if (here.layout.dtype != peer.layout.dtype) {
    return FailedPrecondition("KV dtype: {} has {}, {} has {}", here.worker_id,
                              DTypeName(here.layout.dtype), peer.worker_id,
                              DTypeName(peer.layout.dtype));
  }
  if (here.capability_digest != peer.capability_digest) {
    return FailedPrecondition("capability digest: {} has {}, {} has {}", here.worker_id,
                              here.capability_digest, peer.worker_id, peer.capability_digest);
  }
  return absl::OkStatus();
}

}  // namespace tandem::kvtransfer
