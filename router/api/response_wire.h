// Values of a stream <-> messages. Pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "router/policy/routing_policy.h"
#include "router/request/request.h"
#include "tandem/internal/v1/decode.pb.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::router {

// `out` is overwritten.
// `generated`: as DecodeClient::Start.
void DecodeRequestToProto(const Route& route, const Request& request,
                          std::span<const int32_t> generated, internal::v1::DecodeRequest* out);
void ResponseToProto(const std::string& request_id, const GenerateResponse& response,
                     v1::GenerateResponse* out);

}  // namespace tandem::router
