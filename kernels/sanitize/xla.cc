#include "xla.h"

struct XLA_FFI_Error {
  std::string message;
};

namespace stand_in {
namespace {

XLA_FFI_Error* create(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; }
void get_message(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
void destroy(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  auto* context = reinterpret_cast<Context*>(args->ctx);
  switch (context->when) {
    case When::beside: context->running.emplace_back(args->task, args->data); break;
    case When::inside: args->task(args->data); break;
    case When::afterwards: context->waiting.emplace_back(args->task, args->data); break;
  }
  return nullptr;
}

XLA_FFI_Error* number_of_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = reinterpret_cast<Context*>(args->ctx)->threads;
  return nullptr;
}

XLA_FFI_Buffer buffer_of(Array& array) {
  XLA_FFI_Buffer buffer{};
  buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
  buffer.dtype = array.dtype();
  buffer.data = array.data();
  buffer.rank = static_cast<int64_t>(array.shape().size());
  buffer.dims = array.shape().data();
  return buffer;
}

}  // namespace

std::string call(XLA_FFI_Handler* handler, const std::vector<Array*>& arguments, const std::vector<Array*>& results,
                 std::map<std::string, Attribute> attributes, int64_t threads, When when) {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create;
  api.XLA_FFI_Error_GetMessage = get_message;
  api.XLA_FFI_Error_Destroy = destroy;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = number_of_threads;
  Context context{threads, when, {}, {}};

  std::vector<XLA_FFI_Buffer> buffers;
  buffers.reserve(arguments.size() + results.size());
  std::vector<void*> in, out, scalars;
  for (Array* array : arguments) in.push_back(&buffers.emplace_back(buffer_of(*array)));
  for (Array* array : results) out.push_back(&buffers.emplace_back(buffer_of(*array)));
  std::vector<XLA_FFI_ArgType> in_types(in.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> out_types(out.size(), XLA_FFI_RetType_BUFFER);
  std::vector<XLA_FFI_AttrType> scalar_types(attributes.size(), XLA_FFI_AttrType_SCALAR);
  std::vector<XLA_FFI_ByteSpan> spans;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<XLA_FFI_Scalar> values;
  spans.reserve(attributes.size());
  values.reserve(attributes.size());
  for (auto& [name, attribute] : attributes) {  // in the order of their names
    names.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{name.data(), name.size()}));
    scalars.push_back(&values.emplace_back(XLA_FFI_Scalar{attribute.dtype, &attribute.value}));
  }

  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&context);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(in.size()), in_types.data(), in.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(out.size()), out_types.data(), out.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(names.size()),
                 scalar_types.data(),       names.data(), scalars.data()};
  XLA_FFI_Error* error = handler(&frame);
  for (std::thread& thread : context.running) thread.join();
  for (const auto& [task, data] : context.waiting) task(data);
  const std::string message = error ? error->message : "";
  delete error;
  return message;
}

}  // namespace stand_in
