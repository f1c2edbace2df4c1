#include "memory.h"

#include <memory>

namespace embax {
namespace {

// Beyond so many bytes, memory is given back as soon as much less is needed.
constexpr size_t kKept = size_t{32} << 20;

struct Block {
  std::unique_ptr<char[]> data;
  size_t size = 0;
};

thread_local Block blocks[3];

#if defined(EMBAX_SANITIZE)
// Of exactly the size, so that a sanitizer sees what goes beyond.
bool fits(const Block&, size_t) { return false; }
size_t with_reserve(size_t bytes) { return bytes; }
#else
bool fits(const Block& block, size_t bytes) {
  return block.data && bytes <= block.size && (block.size <= kKept || bytes >= block.size / 4);
}
size_t with_reserve(size_t bytes) { return bytes + bytes / 2; }
#endif

}  // namespace

char* scratch(Holder holder, size_t bytes) {
  Block& block = blocks[static_cast<int>(holder)];
  if (!fits(block, bytes)) {
    block = Block{};
    const size_t size = with_reserve(bytes);
    block.data.reset(new char[size + 63]);
    block.size = size;
  }
  const auto at = reinterpret_cast<uintptr_t>(block.data.get());
  return reinterpret_cast<char*>((at + 63) & ~uintptr_t{63});
}

}  // namespace embax
