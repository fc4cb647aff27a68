#include "kvtransfer/channel/link_self_test.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/transport/probe_pattern.h"

namespace tandem::kvtransfer {
namespace {

constexpr size_t kSmallBytes = size_t{64} << 10;
constexpr size_t kMediumBytes = size_t{1} << 20;
constexpr size_t kLargeBytes = size_t{64} << 20;
// The first request of a pair waits for the test. So the large run is shorter where 64 MB would
// take longer than this (below 16 GB/s), but not so short that its rate says little.
constexpr double kLargeSeconds = 4e-3;
constexpr size_t kLeastLargeBytes = size_t{8} << 20;
constexpr size_t kPatternFrames = 4;   // of kSmallBytes: one for each place that shm has
constexpr size_t kPatternStep = 4096;  // so that none is mistaken for the one before it
constexpr int kEmptyRounds = 9;
constexpr int kSmallRounds = 8;
constexpr int kMediumRounds = 4;

class Prober {
 public:
  Prober(KvConnection* connection, KvWriter* writer, const LinkSelfTestOptions& options)
      : connection_(connection), writer_(writer), options_(options), room_(writer->probe_room()) {}

  absl::Status CheckPattern() {
    const size_t frame = std::min(room_.frame_bytes, kSmallBytes);
    std::vector<std::pair<uint32_t, uint64_t>> expected;  // number, digest
    for (size_t i = 0; i < std::min(room_.frames, kPatternFrames); ++i) {
      const ConstBytes bytes = ProbePattern().subspan(i * kPatternStep, frame);
      expected.emplace_back(next_, PayloadDigest(bytes));
      TANDEM_RETURN_IF_ERROR(Send(frame, bytes));
    }
    for (const auto& [number, digest] : expected) {
      TANDEM_ASSIGN_OR_RETURN(const uint64_t found, AwaitAck(number));
      if (found != digest) {
        return DataLoss("the self-test's pattern came out wrong ({} bytes, frame {})", frame,
                        number);
      }
    }
    return absl::OkStatus();
  }

  // Seconds until the other end has said that `bytes` are there, in as many frames as they need:
  // the best of at most `rounds`, of which no other begins after `limit`.
  absl::StatusOr<double> BestTime(size_t bytes, int rounds, absl::Duration limit) {
    const absl::Time begin = options_.clock->Now();
    absl::Duration best = absl::InfiniteDuration();
    for (int i = 0; i < rounds && (i == 0 || options_.clock->Now() - begin < limit); ++i) {
      const absl::Time start = options_.clock->Now();
      TANDEM_RETURN_IF_ERROR(Move(bytes));
      best = std::min(best, options_.clock->Now() - start);
    }
    return std::max(absl::ToDoubleSeconds(best), 1e-9);
  }

 private:
  absl::Status Move(size_t bytes) {
    const uint32_t first = next_;
    uint32_t acknowledged = first;
    size_t sent = 0;
    do {
      if (next_ - acknowledged == room_.frames) {
        TANDEM_RETURN_IF_ERROR(AwaitAck(acknowledged++).status());
      }
      const size_t n = std::min(bytes - sent, room_.frame_bytes);
      TANDEM_RETURN_IF_ERROR(Send(n, {}));
      sent += n;
    } while (sent < bytes);
    while (acknowledged < next_) TANDEM_RETURN_IF_ERROR(AwaitAck(acknowledged++).status());
    return absl::OkStatus();
  }

  absl::Status Send(size_t bytes, ConstBytes pattern) {
    FrameHeader probe;
    probe.type = FrameType::kProbe;
    probe.ordinal_begin = next_++;
    probe.payload_bytes = static_cast<uint32_t>(bytes);
    probe.code = pattern.empty() ? 0 : 1;
    return writer_->Probe(probe, pattern);
  }

  // The digest that the other end found.
  absl::StatusOr<uint64_t> AwaitAck(uint32_t number) {
    while (true) {
      TANDEM_ASSIGN_OR_RETURN(const FrameHeader reply,
                              connection_->ReceiveHeader(options_.io_timeout));
      if (reply.payload_bytes > kMaxControlPayload) {
        return InvalidArgument("{} frame of {} bytes", FrameTypeName(reply.type),
                               reply.payload_bytes);
      }
      TANDEM_ASSIGN_OR_RETURN(const std::string payload,
                              ReceiveControl(connection_, reply, options_.io_timeout));
      if (reply.type == FrameType::kProbeAck && reply.ordinal_begin == number) {
        uint64_t digest = 0;
        std::memcpy(&digest, payload.data(), std::min(payload.size(), sizeof(digest)));
        return digest;
      }
      // A bad network repeats what was answered before.
      const bool repeated = reply.type == FrameType::kProbeAck && reply.ordinal_begin < number;
      if (!repeated && reply.type != FrameType::kHelloOk && reply.type != FrameType::kSelected) {
        return InvalidArgument("expected PROBE_ACK {}, got {}", number, FrameTypeName(reply.type));
      }
    }
  }

  KvConnection* const connection_;
  KvWriter* const writer_;
  const LinkSelfTestOptions options_;
  const ProbeRoom room_;
  uint32_t next_ = 0;  // number of the next PROBE
};

}  // namespace

absl::StatusOr<KvLinkTest> TestLink(KvConnection* connection, KvWriter* writer,
                                    const LinkSelfTestOptions& options) {
  Prober prober(connection, writer, options);
  const absl::Time end = options.clock->Now() + options.time;
  TANDEM_RETURN_IF_ERROR(prober.CheckPattern());
  KvLinkTest test;
  if (options.time <= absl::ZeroDuration()) return test;
  TANDEM_ASSIGN_OR_RETURN(test.latency_seconds,
                          prober.BestTime(0, kEmptyRounds, options.time / 20));
  TANDEM_ASSIGN_OR_RETURN(double seconds,
                          prober.BestTime(kSmallBytes, kSmallRounds, options.time / 20));
  test.small_rate = static_cast<double>(kSmallBytes) / seconds;
  // What fits the time that is left, going by what was seen so far: by the medium ones' rate there
  // is room for the end of a run that a busy machine delays.
  const auto fits = [&](double rate) {
    const double left = absl::ToDoubleSeconds(end - options.clock->Now());
    return static_cast<size_t>(std::max(left, 0.0) * rate / 2);
  };
  if (fits(test.small_rate) < kMediumBytes) return test;
  TANDEM_ASSIGN_OR_RETURN(seconds, prober.BestTime(kMediumBytes, kMediumRounds, options.time / 10));
  test.medium_rate = static_cast<double>(kMediumBytes) / seconds;
  const auto quick = static_cast<size_t>(test.best_rate() * kLargeSeconds);
  const size_t most =
      std::min({kLargeBytes, std::max(kLeastLargeBytes, quick), fits(test.best_rate())});
  const size_t large = most / kMediumBytes * kMediumBytes;
  if (large <= kMediumBytes) return test;
  TANDEM_ASSIGN_OR_RETURN(seconds, prober.BestTime(large, 1, options.time));
  test.large_bytes = large;
  test.large_rate = static_cast<double>(large) / seconds;
  return test;
}

}  // namespace tandem::kvtransfer
