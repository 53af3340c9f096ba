// A queue of objects that carry their own link, so that queueing allocates nothing.
#pragma once

#include <utility>

namespace wisp {

// T has a member `T* next`. An object is in at most one queue; the queue owns none of them.
template <typename T>
class Fifo final {
 public:
  Fifo() = default;
  Fifo(const Fifo&) = delete;
  Fifo& operator=(const Fifo&) = delete;

  [[nodiscard]] bool empty() const { return first_ == nullptr; }
  // The oldest, or null.
  [[nodiscard]] T* front() const { return first_; }
  void push(T& item) {
    item.next = nullptr;
    if (last_ != nullptr) {
      last_->next = &item;
    } else {
      first_ = &item;
    }
    last_ = &item;
  }
  // Takes the oldest out, or gives null.
  [[nodiscard]] T* pop() {
    T* const item = first_;
    if (item != nullptr) {
      first_ = std::exchange(item->next, nullptr);
      if (first_ == nullptr) {
        last_ = nullptr;
      }
    }
    return item;
  }
  // Moves all of `other` behind what is here.
  void append(Fifo& other) {
    if (other.first_ == nullptr) {
      return;
    }
    if (last_ != nullptr) {
      last_->next = other.first_;
    } else {
      first_ = other.first_;
    }
    last_ = std::exchange(other.last_, nullptr);
    other.first_ = nullptr;
  }

 private:
  T* first_ = nullptr;
  T* last_ = nullptr;
};

}  // namespace wisp
