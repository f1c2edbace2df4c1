// All kernels for one instruction set: EMBAX_ISA names it, and is the namespace of its code.
//
// Nothing here may call a function that the linker could share with another instruction set: no containers, no streams.
#include "kernels.h"

#include "combine.h"
#include "pool.h"
#include "put.h"
#include "step.h"
#include "take.h"
#include "words.h"

#define EMBAX_JOINED(a, b) a##b
#define EMBAX_NAMED(a, b) EMBAX_JOINED(a, b)
#define EMBAX_QUOTED(a) #a
#define EMBAX_TEXT(a) EMBAX_QUOTED(a)

namespace embax {

extern const Kernels EMBAX_NAMED(kernels_, EMBAX_ISA);
const Kernels EMBAX_NAMED(kernels_, EMBAX_ISA) = {
    EMBAX_TEXT(EMBAX_ISA), EMBAX_ISA::take, EMBAX_ISA::set, EMBAX_ISA::add, EMBAX_ISA::combine, EMBAX_ISA::pool,
    EMBAX_ISA::step, EMBAX_ISA::train_words,
};

}  // namespace embax
