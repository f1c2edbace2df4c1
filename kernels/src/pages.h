// Large pages for large tables: reads of random rows then miss fewer entries of the processor's page cache (TLB).
#pragma once

#include <cstddef>

namespace embax {

// Asks Linux for large pages for a table, once for each address, and only for whole pages inside of the table. Memory
// that was written before is moved to large pages, a part in each call, so that no call waits long.
// EMBAX_KERNELS_HUGE_PAGES=0 switches this off; on other systems it does nothing.
void request_large_pages(void* table, size_t bytes);

}  // namespace embax
