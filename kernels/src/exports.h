// The symbols of the library. All others are hidden.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "xla/ffi/api/c_api.h"

#define EMBAX_EXPORT extern "C" __attribute__((visibility("default")))

// The version of embax that the library belongs to.
EMBAX_EXPORT const char* embax_kernels_version();
// The instruction set of the kernels: base, v3 or v4 of x86-64; base elsewhere.
EMBAX_EXPORT const char* embax_kernels_isa();
// How many threads a call has; 0: as many as XLA's pool. For tests.
EMBAX_EXPORT void embax_kernels_set_threads(int number);
// How many calls there were, and how many threads the last one had.
EMBAX_EXPORT int64_t embax_kernels_calls();
EMBAX_EXPORT int embax_kernels_threads_of_last_call();

EMBAX_EXPORT XLA_FFI_Error* EmbaxTake(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxPut(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxCombine(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxPool(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxStepSgd(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxStepAdagrad(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxStepRowwiseAdagrad(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxStepAdam(XLA_FFI_CallFrame*);
EMBAX_EXPORT XLA_FFI_Error* EmbaxStepRowwiseAdam(XLA_FFI_CallFrame*);

// Learns word vectors in place, called by Python without XLA, whose compiler would take more memory than many tables.
// Returns 0; 1 if the arguments are refused, with the reason, which is valid until the thread's next call; or 2 for a
// lack of memory.
EMBAX_EXPORT int embax_kernels_train_words(const embax::Training*, embax::TrainingLoss*, const char** refused);
