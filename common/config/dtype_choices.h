// What --dtype takes, in every program.
#pragma once

#include <string>
#include <vector>

namespace tandem {

inline const std::vector<std::string> kDTypeChoices = {"auto", "bfloat16", "float32"};

}  // namespace tandem
