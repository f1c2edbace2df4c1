#include "memory.h"

#include <memory>

namespace embax {
namespace {

constexpr size_t kKept = size_t{32} << 20;

struct Block {
  std::unique_ptr<char[]> data;
  size_t size = 0;
};

thread_local Block blocks[2];

}  // namespace

char* scratch(Holder holder, size_t bytes) {
  Block& block = blocks[static_cast<int>(holder)];
  if (block.size < bytes || !block.data) {
    const size_t size = bytes + bytes / 2;
    block.data.reset();
    block.size = 0;
    block.data.reset(new char[size + 64]);
    block.size = size;
  }
  const auto at = reinterpret_cast<uintptr_t>(block.data.get());
  return reinterpret_cast<char*>((at + 63) & ~uintptr_t{63});
}

void trim_scratch() {
  for (Block& block : blocks) {
    if (block.size > kKept) block = Block{};
  }
}

}  // namespace embax
