// LoadReport <-> the message of the same name, for workers and router. Pure functions.
#pragma once

#include "common/base/load_report.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem {

internal::v1::LoadReport LoadReportToProto(const LoadReport& report);
LoadReport LoadReportFromProto(const internal::v1::LoadReport& proto);

}  // namespace tandem
