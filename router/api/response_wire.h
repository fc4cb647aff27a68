// Values of a stream <-> messages. Pure functions.
#pragma once

#include <string>

#include "router/policy/routing_policy.h"
#include "router/request/request.h"
#include "tandem/internal/v1/decode.pb.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::router {

// `out` is overwritten.
void DecodeRequestToProto(const Route& route, const Request& request,
                          internal::v1::DecodeRequest* out);
void ResponseToProto(const std::string& request_id, const GenerateResponse& response,
                     v1::GenerateResponse* out);

}  // namespace tandem::router
