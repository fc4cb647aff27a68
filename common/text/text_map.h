// A hash map from text that is looked up by std::string_view.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"

namespace tandem {

// XXH3, as every piece of every prompt is looked up.
struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const;
};

template <typename Value>
using TextMap = absl::flat_hash_map<std::string, Value, TextHash, std::equal_to<>>;

}  // namespace tandem
