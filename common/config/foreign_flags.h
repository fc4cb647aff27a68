// Flags of vLLM, TGI and llama.cpp that people bring along, and what to do here instead.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace tandem {

// "use --max-model-len" for --ctx-size; nullopt where the flag is not known.
std::optional<std::string_view> ForeignFlagHint(std::string_view name);

// All of them, by name, for the documents.
std::span<const std::pair<std::string_view, std::string_view>> ForeignFlagHints();

}  // namespace tandem
