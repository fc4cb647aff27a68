#include "common/rpc/load_wire.h"

namespace tandem {
namespace {

void LinkToProto(const std::string& peer, const KvLink& link, internal::v1::LinkRate* out) {
  out->set_peer_worker_id(peer);
  out->set_bytes_per_second(link.bytes_per_second);
  out->set_transport(link.transport);
  out->set_small_bytes_per_second(link.test.small_rate);
  out->set_medium_bytes_per_second(link.test.medium_rate);
  out->set_large_bytes_per_second(link.test.large_rate);
  out->set_large_bytes(link.test.large_bytes);
  out->set_latency_seconds(link.test.latency_seconds);
  out->set_least_bytes_per_second(link.least_bytes_per_second);
  out->set_slow(link.slow);
  out->set_refused(link.refused);
  out->set_note(link.note);
}

KvLink LinkFromProto(const internal::v1::LinkRate& proto) {
  return {.bytes_per_second = proto.bytes_per_second(),
          .transport = proto.transport(),
          .test = {.small_rate = proto.small_bytes_per_second(),
                   .medium_rate = proto.medium_bytes_per_second(),
                   .large_rate = proto.large_bytes_per_second(),
                   .large_bytes = proto.large_bytes(),
                   .latency_seconds = proto.latency_seconds()},
          .least_bytes_per_second = proto.least_bytes_per_second(),
          .slow = proto.slow(),
          .refused = proto.refused(),
          .note = proto.note()};
}

}  // namespace

internal::v1::LoadReport LoadReportToProto(const LoadReport& report) {
  internal::v1::LoadReport proto;
  proto.set_running(static_cast<uint32_t>(report.running));
  proto.set_waiting(static_cast<uint32_t>(report.waiting));
  proto.set_waiting_tokens(static_cast<uint64_t>(report.waiting_tokens));
  proto.set_blocks_free(static_cast<uint32_t>(report.blocks_free));
  proto.set_blocks_cached(static_cast<uint32_t>(report.blocks_cached));
  proto.set_blocks_used(static_cast<uint32_t>(report.blocks_used));
  proto.set_blocks_quarantined(static_cast<uint32_t>(report.blocks_quarantined));
  proto.set_admits_blocks(static_cast<uint32_t>(report.admits_blocks));
  proto.set_promised_blocks(static_cast<uint32_t>(report.promised_blocks));
  proto.set_promised_sequences(static_cast<uint32_t>(report.promised_sequences));
  proto.set_prefill_tokens_per_second(report.prefill_tokens_per_second);
  proto.set_prefill_fit_tokens(report.prefill_fit_tokens);
  proto.set_saturated_tokens_per_second(report.saturated_tokens_per_second);
  proto.set_decode_step_milliseconds(report.decode_step_milliseconds);
  for (const auto& [peer, link] : report.links) LinkToProto(peer, link, proto.add_links());
  for (const auto& [peer, failures] : report.prefill_failures) {
    internal::v1::PrefillFailures* out = proto.add_prefill_failures();
    out->set_worker_id(peer);
    out->set_failures(static_cast<uint32_t>(failures.in_a_row));
    out->set_seconds_ago(failures.seconds_ago);
  }
  for (const auto& [peer, tokens] : report.prefill_backlog) {
    internal::v1::PrefillBacklog* out = proto.add_prefill_backlog();
    out->set_worker_id(peer);
    out->set_tokens(static_cast<uint64_t>(tokens));
  }
  return proto;
}

LoadReport LoadReportFromProto(const internal::v1::LoadReport& proto) {
  LoadReport report;
  report.running = static_cast<int>(proto.running());
  report.waiting = static_cast<int>(proto.waiting());
  report.waiting_tokens = static_cast<int64_t>(proto.waiting_tokens());
  report.blocks_free = static_cast<int>(proto.blocks_free());
  report.blocks_cached = static_cast<int>(proto.blocks_cached());
  report.blocks_used = static_cast<int>(proto.blocks_used());
  report.blocks_quarantined = static_cast<int>(proto.blocks_quarantined());
  report.admits_blocks = static_cast<int>(proto.admits_blocks());
  report.promised_blocks = static_cast<int>(proto.promised_blocks());
  report.promised_sequences = static_cast<int>(proto.promised_sequences());
  report.prefill_tokens_per_second = proto.prefill_tokens_per_second();
  report.prefill_fit_tokens = proto.prefill_fit_tokens();
  report.saturated_tokens_per_second = proto.saturated_tokens_per_second();
  report.decode_step_milliseconds = proto.decode_step_milliseconds();
  for (const internal::v1::LinkRate& link : proto.links()) {
    report.links[link.peer_worker_id()] = LinkFromProto(link);
  }
  for (const internal::v1::PrefillFailures& failures : proto.prefill_failures()) {
    report.prefill_failures[failures.worker_id()] = {static_cast<int>(failures.failures()),
                                                     failures.seconds_ago()};
  }
  for (const internal::v1::PrefillBacklog& backlog : proto.prefill_backlog()) {
    report.prefill_backlog[backlog.worker_id()] = static_cast<int64_t>(backlog.tokens());
  }
  return report;
}

}  // namespace tandem
