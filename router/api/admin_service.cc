#include "router/api/admin_service.h"

#include <algorithm>
#include <string>

#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

void WorkerToProto(const WorkerView& view, absl::Time now, absl::Duration stalled_after,
                   v1::Worker* out) {
  const WorkerIdentity& identity = *view.identity;
  const LoadReport& load = *view.load;
  out->set_worker_id(identity.id);
  out->set_role(std::string(WorkerRoleName(identity.role)));
  out->set_state(std::string(view.State(now, stalled_after)));
  out->set_address(identity.address);
  out->set_metrics_address(identity.metrics_address);
  out->set_running(static_cast<uint32_t>(load.running));
  out->set_waiting(static_cast<uint32_t>(load.waiting));
  out->set_waiting_tokens(static_cast<uint64_t>(load.waiting_tokens));
  out->set_blocks_total(static_cast<uint32_t>(identity.num_blocks));
  out->set_blocks_free(static_cast<uint32_t>(load.blocks_free));
  out->set_blocks_cached(static_cast<uint32_t>(load.blocks_cached));
  out->set_blocks_used(static_cast<uint32_t>(load.blocks_used));
  out->set_blocks_quarantined(static_cast<uint32_t>(load.blocks_quarantined));
  const absl::Time since = std::max(view.reported, identity.joined);
  out->set_seconds_since_report(absl::ToDoubleSeconds(now - since));
  out->set_prefill_tokens_per_second(load.prefill_tokens_per_second);
  out->set_max_num_seqs(static_cast<uint32_t>(identity.max_num_seqs));
  if (load.decode_step_milliseconds > 0) {
    out->set_decode_tokens_per_second(1000.0 * load.running / load.decode_step_milliseconds);
  }
  out->set_uptime_seconds(absl::ToDoubleSeconds(now - identity.joined));
}

void LinkToProto(const std::string& src, const std::string& dst, const KvLink& link,
                 v1::Link* out) {
  out->set_src(src);
  out->set_dst(dst);
  out->set_transport(link.transport);
  out->set_bytes_per_second(link.bytes_per_second);
  out->set_small_bytes_per_second(link.test.small_rate);
  out->set_medium_bytes_per_second(link.test.medium_rate);
  out->set_large_bytes_per_second(link.test.large_rate);
  out->set_large_bytes(link.test.large_bytes);
  out->set_latency_seconds(link.test.latency_seconds);
  out->set_least_bytes_per_second(link.least_bytes_per_second);
  out->set_state(link.refused ? "refused" : link.slow ? "slow" : "ok");
  out->set_note(link.note);
}

}  // namespace

grpc::ServerUnaryReactor* AdminService::GetCluster(grpc::CallbackServerContext* context,
                                                   const v1::GetClusterRequest*,
                                                   v1::GetClusterResponse* response) {
  const std::shared_ptr<const ClusterView> view = core_->view();
  const int queued = core_->queued_requests();
  response->set_model(core_->model().name);
  response->set_capability(view->capability);
  response->set_max_model_len(static_cast<uint32_t>(core_->max_model_len()));
  response->set_dtype(view->dtype);
  response->set_block_size(static_cast<uint32_t>(view->block_size));
  response->set_queued_requests(static_cast<uint32_t>(queued));
  response->set_running_requests(
      static_cast<uint32_t>(std::max(0, core_->open_streams().open() - queued)));
  const absl::Time now = core_->clock()->Now();
  for (const WorkerView& worker : view->workers) {
    WorkerToProto(worker, now, core_->stalled_after(), response->add_workers());
    for (const auto& [peer, link] : worker.load->links) {
      // A sender remembers peers that have left.
      if (view->Find(peer) == nullptr) continue;
      LinkToProto(worker.identity->id, peer, link, response->add_links());
    }
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* AdminService::DrainWorker(grpc::CallbackServerContext* context,
                                                    const v1::DrainWorkerRequest* request,
                                                    v1::DrainWorkerResponse*) {
  absl::Status status;
  if (request->worker_id().empty()) {
    status = BadField("worker_id", "must not be empty");
  } else {
    status = WithField(core_->DrainWorker(request->worker_id()), "worker_id");
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace tandem::router
