// Values of a stream <-> messages. Pure functions.
#pragma once

#include <string>

#include "router/stream/request.h"
#include "tandem/internal/v1/decode.pb.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::router {

void FillDecodeRequest(const Assignment& assignment, const Request& request,
                       internal::v1::DecodeRequest* out);
TokenEvent ReadTokenEvent(const internal::v1::TokenEvent& event);
void FillResponse(const std::string& request_id, const StreamUpdate& update,
                  v1::GenerateResponse* out);

}  // namespace tandem::router
