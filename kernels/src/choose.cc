// Which kernels run here.
#include <cstdlib>
#include <cstring>

#include "exports.h"
#include "kernels.h"

namespace embax {
namespace {

const Kernels& choose() {
#if defined(EMBAX_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  // A name that is not here, or that this machine cannot run, leaves the choice to the machine.
  const char* wanted = std::getenv("EMBAX_KERNELS_ISA");
  if (wanted && !std::strcmp(wanted, "base")) return kernels_base;
  if (wanted && !std::strcmp(wanted, "v3") && v3) return kernels_v3;
  if (v4) return kernels_v4;
  if (v3) return kernels_v3;
#endif
  return kernels_base;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace embax

const char* embax_kernels_version() { return EMBAX_VERSION; }
const char* embax_kernels_isa() { return embax::kernels().name; }
