// An exception that leaves an OpenMP region ends the process. What a region's iterations throw is kept and thrown behind it,
// so that a failed allocation becomes std::bad_alloc (MemoryError in Python).
#pragma once

#include <atomic>
#include <exception>

namespace ampo {

class FirstError {
 public:
  // Any thread; does nothing once a call has thrown.
  template <typename Work>
  void keep(const Work& work) noexcept {
    if (has_thrown_.load(std::memory_order_relaxed)) return;
    try {
      work();
    } catch (...) {
      if (!has_thrown_.exchange(true)) error_ = std::current_exception();
    }
  }

  // Behind the region, whose end makes error_ visible.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> has_thrown_{false};
  std::exception_ptr error_;
};

}  // namespace ampo
