#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#endif

namespace embax {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr size_t kLeast = size_t{64} << 20;
constexpr uintptr_t kPage = uintptr_t{2} << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1; the C library may not know its name
// Moved without a look at the clock, and how long a call may go on.
constexpr uintptr_t kStep = uintptr_t{8} << 20;
constexpr auto kPatience = std::chrono::milliseconds(200);
// Tables remembered; then all are forgotten, which costs a request each.
constexpr size_t kMost = 4096;

bool switched_on() {
  static const bool on = [] {
    const char* option = std::getenv("EMBAX_KERNELS_HUGE_PAGES");
    if (option && !std::strcmp(option, "0")) return false;
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string modes;
    std::getline(file, modes);
    return !modes.empty() && modes.find("[never]") == std::string::npos;
  }();
  return on;
}

// What is left to move of a table.
struct Rest {
  uintptr_t next, end;
};

// Moves as much as the time allows. An old system knows no such request; its own thread moves pages in time.
void move_some(Rest& rest) {
  const auto start = std::chrono::steady_clock::now();
  while (rest.next < rest.end && std::chrono::steady_clock::now() - start < kPatience) {
    const uintptr_t step = rest.end - rest.next < kStep ? rest.end - rest.next : kStep;
    const bool moved = madvise(reinterpret_cast<void*>(rest.next), step, kCollapse) == 0;
    rest.next = !moved && errno == EINVAL ? rest.end : rest.next + step;
  }
}

}  // namespace

void request_large_pages(void* table, size_t bytes) {
  if (bytes < kLeast || !switched_on()) return;
  static std::mutex mutex;
  static auto* tables = new std::map<std::pair<uintptr_t, size_t>, Rest>;
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return;  // another call is at it
  const auto begin = reinterpret_cast<uintptr_t>(table);
  const auto found = tables->find({begin, bytes});
  if (found != tables->end()) {
    if (found->second.next < found->second.end) move_some(found->second);
    return;
  }
  if (tables->size() >= kMost) tables->clear();
  Rest& rest = (*tables)[{begin, bytes}];
  rest = {(begin + kPage - 1) & ~(kPage - 1), (begin + bytes) & ~(kPage - 1)};
  if (rest.next >= rest.end) return;
  if (madvise(reinterpret_cast<void*>(rest.next), rest.end - rest.next, MADV_HUGEPAGE) != 0) rest.next = rest.end;
  move_some(rest);
}

#else

void request_large_pages(void*, size_t) {}

#endif

}  // namespace embax
