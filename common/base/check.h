// TANDEM_CHECK(condition, format, args...): a broken invariant ends the process with a message; the
// process manager restarts it and the router re-routes. Never for input: that is absl::Status.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "fmt/format.h"

#define TANDEM_CHECK(condition, ...)                                                               \
  do {                                                                                             \
    if (!(condition)) [[unlikely]] {                                                               \
      fmt::print(stderr, "FATAL {}:{}: broken invariant {}: {}\n", __FILE__, __LINE__, #condition, \
                 fmt::format("" __VA_ARGS__));                                                     \
      std::fflush(stderr);                                                                         \
      std::abort();                                                                                \
    }                                                                                              \
  } while (false)
