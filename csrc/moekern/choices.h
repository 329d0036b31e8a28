// Choices that Python's pure functions make for C++: integers in, integers out. A case is asked for once and
// remembered, so that a call whose case is known runs no Python.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <type_traits>
#include <unordered_map>

namespace moekern {

// Calls `function`, "module:name", with integers, and writes down as many as it has to return. Set by csrc/bindings.
using Ask = void (*)(const char* function, const int64_t* given, int count, int32_t* chosen, int expected);
inline Ask ask_python = nullptr;

// Case: a struct of int64_t, the function's parameters in order. Choice: one of int32_t, what it returns, in order.
template <class Choice, class Case>
class Choices {
  static_assert(std::is_trivially_copyable_v<Case> && sizeof(Case) % sizeof(int64_t) == 0);
  static_assert(std::is_trivially_copyable_v<Choice> && sizeof(Choice) % sizeof(int32_t) == 0);
  static constexpr int kGiven = sizeof(Case) / sizeof(int64_t), kChosen = sizeof(Choice) / sizeof(int32_t);
  static constexpr size_t kMost = 1 << 14;  // cases: of a model, tens of layers times the numbers of tokens met
  using Key = std::array<int64_t, kGiven>;

  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t h = 0;
      for (int64_t word : key) {
        h = (h ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15;
        h ^= h >> 32;
      }
      return h;
    }
  };

 public:
  explicit Choices(const char* function) : function_(function) {}

  Choice operator()(const Case& of) {
    Key key;
    std::memcpy(key.data(), &of, sizeof of);
    {
      const std::shared_lock<std::shared_mutex> lock(mutex_);
      if (const auto found = known_.find(key); found != known_.end()) return found->second;
    }
    std::array<int32_t, kChosen> chosen;  // not under the lock: whoever has Python's may wait for ours
    ask_python(function_, key.data(), kGiven, chosen.data(), kChosen);
    Choice choice;
    std::memcpy(&choice, chosen.data(), sizeof choice);
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    if (known_.size() >= kMost) known_.clear();
    known_.emplace(key, choice);
    return choice;
  }

 private:
  const char* function_;
  std::shared_mutex mutex_;
  std::unordered_map<Key, Choice, Hash> known_;
};

}  // namespace moekern
