// The fixtures of tests/data/text, read once per process.
#pragma once

#include <memory>
#include <string>

#include "nlohmann/json.hpp"

#include "common/base/file.h"
#include "common/text/tokenizer.h"
#include "tests/support/paths.h"

namespace tandem {

inline std::string FixtureText(const std::string& name) {
  auto text = ReadFile(SourcePath("tests/data/text/" + name));
  EXPECT_OK(text);
  return text.ok() ? *text : std::string();
}

inline nlohmann::json FixtureJson(const std::string& name) {
  return nlohmann::json::parse(FixtureText(name));
}

inline std::shared_ptr<const Tokenizer> FixtureTokenizer() {
  static const auto* const tokenizer = new std::shared_ptr<const Tokenizer>(
      Tokenizer::Load(SourcePath("tests/data/text/tokenizer.json")).value());
  return *tokenizer;
}

}  // namespace tandem
