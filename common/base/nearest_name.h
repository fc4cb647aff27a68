// "Unknown flag --max-model-length; did you mean --max-model-len?"
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace tandem {

// The candidate with the smallest edit distance to `name`, if it is close enough to be a likely
// typo.
std::optional<std::string> NearestName(std::string_view name,
                                       std::span<const std::string> candidates);

}  // namespace tandem
