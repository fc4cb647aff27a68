// The values that a chat template computes with: Python's, as far as Jinja shows them.
//
// Not thread-safe while one thread changes a list or dictionary; constants may be shared.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace tandem::jinja {

// UTF-8 text that remembers of each byte whether the template wrote it or whether it is data: what
// users and tools wrote. All operations carry the marks along, so that a special token spelled in a
// message can be told from one that the template wrote, however the template cut the message.
class Text {
 public:
  Text() = default;
  explicit Text(std::string_view chars, bool data = false)
      : chars_(chars), marks_(chars.size(), data ? '\1' : '\0') {}

  std::string_view chars() const { return chars_; }
  size_t size() const { return chars_.size(); }
  bool empty() const { return chars_.empty(); }
  bool IsData(size_t byte) const { return marks_[byte] != 0; }

  void Append(const Text& other) {
    chars_ += other.chars_;
    marks_ += other.marks_;
  }
  // Bytes [begin, end).
  Text Sub(size_t begin, size_t end) const;
  // The same marks with other characters of the same number of bytes.
  Text WithChars(std::string chars) const;

 private:
  std::string chars_;
  std::string marks_;  // '\1' for data
};

// Bounds of what a template may build.
inline constexpr size_t kMaxTextBytes = size_t{64} << 20;
inline constexpr size_t kMaxListLength = 1'000'000;
inline constexpr int kMaxNesting = 100;  // of lists and dictionaries

class Value;
using List = std::vector<Value>;
struct Dict;
struct NestedList;
struct Macro;

struct Undefined {
  std::string name;  // of what is missing, for messages
};
struct None {};
// A number that is no 64-bit integer, with Python's spelling where JSON gave it one.
struct Float {
  double value;
  std::string spelling;
};
// A macro of the template, or the global function of this name.
struct Function {
  std::string name;
  const Macro* macro = nullptr;
};

class Value {
 public:
  using Data = std::variant<Undefined, None, bool, int64_t, Float, std::shared_ptr<const Text>,
                            std::shared_ptr<NestedList>, std::shared_ptr<Dict>, Function>;

  Value() : data_(Undefined{}) {}
  explicit Value(Data data) : data_(std::move(data)) {}
  explicit Value(bool value) : data_(value) {}
  explicit Value(int64_t value) : data_(value) {}
  explicit Value(Text text) : data_(std::make_shared<const Text>(std::move(text))) {}
  // Undefined if that nests deeper than kMaxNesting, or would hold a namespace: so no value can
  // hold itself, and walking one needs little stack.
  explicit Value(List list);
  explicit Value(Dict dict);

  template <class T>
  const T* As() const {
    return std::get_if<T>(&data_);
  }
  // Null if it is something else.
  const Text* text() const;
  List* list() const;
  Dict* dict() const;

  bool IsUndefined() const { return As<Undefined>() != nullptr; }
  bool IsNone() const { return As<None>() != nullptr; }
  // Also of a bool, which is a number in Python.
  bool IsNumber() const;
  double Number() const;

  bool Truth() const;
  bool operator==(const Value& other) const;
  // As str() shows it, cut off beyond kMaxTextBytes; within a list or dictionary as repr() does.
  Text ToText() const;
  // "a list", for messages.
  std::string_view KindName() const;

 private:
  // Levels of lists and dictionaries; a namespace counts as too many to be part of another value.
  int Nesting() const;
  void AppendRepr(Text* out) const;

  Data data_;
};

struct NestedList {
  List elements;
  int nesting;
};

// Keys are texts; they stay in the order of their first insertion.
struct Dict {
  std::vector<std::pair<Text, Value>> members;
  bool is_namespace = false;  // its attributes may be assigned
  int nesting = 1;            // when it became a value

  Value* Find(std::string_view key);
  void Set(Text key, Value value);
};

}  // namespace tandem::jinja
