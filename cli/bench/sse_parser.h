// Server-sent events out of the pieces in which they come. Not thread-safe.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace tandem::cli {

class SseParser {
 public:
  // Calls `on_data` with the data of each event that `piece` completes. What is no data is passed
  // over; so is an event of several lines of data but for its last.
  void Push(std::string_view piece, const std::function<void(std::string_view data)>& on_data);

 private:
  std::string line_;  // not complete yet
};

}  // namespace tandem::cli
