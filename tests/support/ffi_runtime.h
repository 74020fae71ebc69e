// As much of XLA as a handler needs: errors, a thread pool, buffers and call frames. Memory can be
// made to run out at any allocation of a handler.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
  XLA_FFI_Error_Code code;
};

namespace runtime {

constexpr int64_t kNoLimit = int64_t{1} << 62;
inline std::atomic<int64_t> allocations_left{kNoLimit};
// Whether this thread runs the code of the runtime, whose memory does not run out.
inline thread_local bool inside = false;

struct Inside {
  bool before = std::exchange(inside, true);
  ~Inside() { inside = before; }
};

// Threads that run tasks in the order in which they come.
class Pool {
 public:
  explicit Pool(int64_t count) {
    for (int64_t i = 0; i < count; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void Schedule(XLA_FFI_Task* task, void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back({task, data});
    }
    changed_.notify_one();
  }
  int64_t size() const { return static_cast<int64_t>(threads_.size()); }

 private:
  void Run() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto [task, data] = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task(data);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace runtime

#if XLA_FFI_API_MINOR >= 4  // from jaxlib 0.11 on
struct XLA_FFI_InvokeContext {
#else
struct XLA_FFI_ExecutionContext {
#endif
  runtime::Pool* pool;
};

namespace runtime {

inline XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
    const Inside runtime;
    return new XLA_FFI_Error{args->message, args->errc};
  };
#if XLA_FFI_API_MINOR >= 4
  api.XLA_FFI_Error_GetDetails = [](XLA_FFI_Error_GetDetails_Args* args) {
    args->message = args->error->message.c_str();
    args->errc = args->error->code;
  };
#else
  api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
    args->message = args->error->message.c_str();
  };
#endif
  api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) {
    const Inside runtime;
    args->ctx->pool->Schedule(args->task, args->data);
    return static_cast<XLA_FFI_Error*>(nullptr);
  };
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) {
    *args->num_threads = args->ctx->pool->size();
    return static_cast<XLA_FFI_Error*>(nullptr);
  };
  return api;
}

// An array in memory of exactly its size, which a sanitizer guards.
struct Buffer {
  XLA_FFI_DataType type;
  std::vector<int64_t> sizes;
  std::unique_ptr<char[]> data;

  int64_t Width() const {
    return type == XLA_FFI_DataType_F32 || type == XLA_FFI_DataType_S32 ? 4
           : type == XLA_FFI_DataType_BF16                              ? 2
                                                                        : 1;
  }
  int64_t Count() const {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    return count;
  }
  int64_t Bytes() const { return Count() * Width(); }
};

using Attribute = std::variant<int64_t, bool, float, std::vector<int64_t>>;

struct Call {
  XLA_FFI_Handler* handler;
  std::vector<Buffer> arguments, results;
  std::map<std::string, Attribute> attributes;  // in order, as XLA has them

  // OK where there is no error; a handler's memory runs out after so many allocations.
  XLA_FFI_Error_Code Run(Pool& pool, int64_t allocations, std::string& message) {
    static const XLA_FFI_Api api = MakeApi();
    XLA_FFI_ExecutionContext context{&pool};
    std::vector<XLA_FFI_Buffer> buffers;
    for (auto* list : {&arguments, &results})
      for (Buffer& b : *list)
        buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, b.type, b.data.get(),
                           static_cast<int64_t>(b.sizes.size()), b.sizes.data()});
    std::vector<void*> places;
    for (XLA_FFI_Buffer& buffer : buffers) places.push_back(&buffer);
    std::vector<XLA_FFI_ArgType> argument_types(arguments.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);
    Attributes converted(attributes);
    XLA_FFI_CallFrame frame{};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &api;
    frame.ctx = &context;
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(arguments.size()),
                  argument_types.data(), places.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(results.size()),
                  result_types.data(), places.data() + arguments.size()};
    frame.attrs = converted.View();
    allocations_left = allocations;
    std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
    allocations_left = kNoLimit;
    message = error == nullptr ? "" : error->message;
    return error == nullptr ? XLA_FFI_Error_Code_OK : error->code;
  }

 private:
  struct Attributes {
    std::deque<XLA_FFI_ByteSpan> names;
    std::deque<XLA_FFI_Scalar> scalars;
    std::deque<XLA_FFI_Array> arrays;
    std::vector<XLA_FFI_ByteSpan*> name_at;
    std::vector<XLA_FFI_AttrType> types;
    std::vector<void*> values;

    explicit Attributes(std::map<std::string, Attribute>& from) {
      for (auto& [name, value] : from) {
        names.push_back({name.data(), name.size()});
        name_at.push_back(&names.back());
        if (auto* array = std::get_if<std::vector<int64_t>>(&value)) {
          arrays.push_back({XLA_FFI_DataType_S64, array->size(), array->data()});
          values.push_back(&arrays.back());
          types.push_back(XLA_FFI_AttrType_ARRAY);
          continue;
        }
        if (auto* number = std::get_if<int64_t>(&value))
          scalars.push_back({XLA_FFI_DataType_S64, number});
        else if (auto* real = std::get_if<float>(&value))
          scalars.push_back({XLA_FFI_DataType_F32, real});
        else
          scalars.push_back({XLA_FFI_DataType_PRED, &std::get<bool>(value)});
        values.push_back(&scalars.back());
        types.push_back(XLA_FFI_AttrType_SCALAR);
      }
    }
    XLA_FFI_Attrs View() {
      return {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, static_cast<int64_t>(types.size()),
              types.data(), name_at.data(), values.data()};
    }
  };
};

}  // namespace runtime

void* operator new(size_t size) {
  if (!runtime::inside && runtime::allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
