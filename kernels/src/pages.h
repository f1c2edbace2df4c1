// Large pages for large tables: random rows then miss fewer of the processor's entries for pages.
#pragma once

#include <cstddef>

namespace embax {

// Asks Linux for large pages under a table, once for each address, where it gives them on request: for whole pages
// inside of the table only. Memory that was written before is moved, a part in each call, so that no call waits long.
// EMBAX_KERNELS_HUGE_PAGES=0 switches it off; on other systems it does nothing.
void request_large_pages(void* table, size_t bytes);

}  // namespace embax
