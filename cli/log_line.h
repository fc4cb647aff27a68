// How much a line that a child process wrote on stderr matters; the log's formats are those of
// common/base/log.h. Pure.
#pragma once

#include <string>

namespace tandem::cli {

enum class LineKind {
  kRoutine,  // a log line of level info or below
  kWarning,
  kError,
  kBare,  // not of the log: the one line of a program that ends, or what a library prints
};

LineKind KindOf(const std::string& line);

// What a line says, without time, level and name.
std::string TextOf(const std::string& line);

}  // namespace tandem::cli
