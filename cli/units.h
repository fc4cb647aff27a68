// Figures as people read them. Pure.
#pragma once

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace tandem::cli {

// "13,891".
std::string CountText(uint64_t count);
// "3.2s", "47s", "2m14s", "5h03m", "12d04h".
std::string TimeText(absl::Duration time);
// "12 %"; what is more than nothing is at least "1 %", and what is less than all at most "99 %".
std::string ShareText(uint64_t part, uint64_t whole);

}  // namespace tandem::cli
