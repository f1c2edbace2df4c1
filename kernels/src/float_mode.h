// How a thread rounds and whether it flushes subnormal numbers: helpers take over the mode of their caller, so that a
// result does not depend on which thread computed it.
#pragma once

#include <cstdint>

namespace embax {

#if defined(__x86_64__)
using FloatMode = unsigned int;
inline FloatMode float_mode() { return __builtin_ia32_stmxcsr(); }
inline void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
inline FloatMode flushing(FloatMode mode) { return mode | 0x8040; }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
inline FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
inline FloatMode flushing(FloatMode mode) { return mode; }
#endif

class FloatModeGuard {
 public:
  explicit FloatModeGuard(FloatMode mode) : before_(float_mode()) { set_float_mode(mode); }
  ~FloatModeGuard() { set_float_mode(before_); }
  FloatModeGuard(const FloatModeGuard&) = delete;
  FloatModeGuard& operator=(const FloatModeGuard&) = delete;

 private:
  FloatMode before_;
};

}  // namespace embax
