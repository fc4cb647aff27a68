#include "common/rpc/status.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "absl/strings/cord.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace tandem {
namespace {

constexpr char kBadRequestUrl[] = "type.googleapis.com/google.rpc.BadRequest";
constexpr char kRetryInfoUrl[] = "type.googleapis.com/google.rpc.RetryInfo";
// Message and details travel in trailing metadata, of which peers accept 8 KiB in all; a message
// may quote what the user sent.
constexpr size_t kMaxStatusMessageBytes = 1000;

// Bytes of the UTF-8 character at the start of `text`, 0 if it is not well formed (RFC 3629).
size_t Utf8Length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const bool overlong = (lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xF0 && byte(1) < 0x90);
  const bool invalid = (lead == 0xED && byte(1) > 0x9F) || (lead == 0xF4 && byte(1) > 0x8F);
  return overlong || invalid ? 0 : length;
}

// Well-formed UTF-8 (proto strings must be), bounded.
std::string SafeMessage(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    if (out.size() >= kMaxStatusMessageBytes) return out + "...";
    const size_t length = Utf8Length(text);
    if (length == 0) {
      out += '?';
    } else {
      out += text.substr(0, length);
    }
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return out;
}

std::string_view Message(const absl::Status& status) {
  return {status.message().data(), status.message().size()};
}

template <typename Detail>
Detail DetailOf(const absl::Status& status, const char* url) {
  Detail detail;
  if (const auto payload = status.GetPayload(url)) {
    // A payload of our own making; where it does not parse there is no detail.
    if (!detail.ParseFromString(std::string(*payload))) detail.Clear();
  }
  return detail;
}

}  // namespace

absl::Status WithField(absl::Status status, const std::string& field) {
  if (status.ok()) return status;
  auto detail = DetailOf<google::rpc::BadRequest>(status, kBadRequestUrl);
  auto* violation = detail.add_field_violations();
  violation->set_field(SafeMessage(field));
  violation->set_description(SafeMessage(Message(status)));
  status.SetPayload(kBadRequestUrl, absl::Cord(detail.SerializeAsString()));
  return status;
}

absl::Status WithRetryAfter(absl::Status status, absl::Duration delay) {
  if (status.ok()) return status;
  google::rpc::RetryInfo detail;
  const int64_t nanos = absl::ToInt64Nanoseconds(std::max(delay, absl::ZeroDuration()));
  detail.mutable_retry_delay()->set_seconds(nanos / 1'000'000'000);
  detail.mutable_retry_delay()->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
  status.SetPayload(kRetryInfoUrl, absl::Cord(detail.SerializeAsString()));
  return status;
}

std::vector<FieldViolation> FieldViolations(const absl::Status& status) {
  std::vector<FieldViolation> out;
  const auto detail = DetailOf<google::rpc::BadRequest>(status, kBadRequestUrl);
  for (const auto& violation : detail.field_violations()) {
    out.push_back({violation.field(), violation.description()});
  }
  return out;
}

std::optional<absl::Duration> RetryAfter(const absl::Status& status) {
  if (!status.GetPayload(kRetryInfoUrl)) return std::nullopt;
  const auto detail = DetailOf<google::rpc::RetryInfo>(status, kRetryInfoUrl);
  return absl::Seconds(detail.retry_delay().seconds()) +
         absl::Nanoseconds(detail.retry_delay().nanos());
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());
  const std::string message = SafeMessage(Message(status));
  google::rpc::Status details;
  details.set_code(static_cast<int>(code));
  details.set_message(message);
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    auto* any = details.add_details();
    any->set_type_url(std::string(url));
    any->set_value(std::string(payload));
  });
  if (details.details().empty()) return grpc::Status(code, message);
  return grpc::Status(code, message, details.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status out(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) {
      out.SetPayload(any.type_url(), absl::Cord(any.value()));
    }
  }
  return out;
}

}  // namespace tandem
