#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace simt {

namespace {

constexpr std::size_t kGuard = 4096;

// Used by one thread: that of the machine. Never destroyed, as that thread never ends.
std::vector<std::byte*>& unused() {
  static auto* const stacks = new std::vector<std::byte*>;
  return *stacks;
}

}  // namespace

std::byte* Stack::take() {
  if (!unused().empty()) {
    std::byte* const stack = unused().back();
    unused().pop_back();
    return stack;
  }
  void* const mapped = mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapped == MAP_FAILED || mprotect(mapped, kGuard, PROT_NONE) != 0) {
    std::perror("fake libcuda: no memory for the stack of a lane");
    std::abort();
  }
  return static_cast<std::byte*>(mapped) + kGuard;
}

void Stack::give_back(std::byte* stack) { unused().push_back(stack); }

Fiber::~Fiber() {
  if (stack_ != nullptr) Stack::give_back(stack_);
}

#if defined(__x86_64__)

extern "C" void simt_switch(void** save, void* load);
extern "C" void simt_begin();

// Registers that a function must leave as they are (System V ABI, x86-64, 3.2.1) go onto the stack that is left.
asm(R"(
  .text
  .type simt_switch, @function
  .hidden simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, .-simt_switch
  .type simt_begin, @function
  .hidden simt_begin
simt_begin:
  movq %r12, %rdi
  xorl %ebp, %ebp
  call *%r13
  ud2
  .size simt_begin, .-simt_begin
)");

void Fiber::start(void (*function)(void*), void* argument) {
  if (stack_ == nullptr) stack_ = Stack::take();
  auto** top = reinterpret_cast<void**>(stack_ + Stack::kBytes) - 2;  // aligned to 16 where simt_begin begins
  *--top = reinterpret_cast<void*>(&simt_begin);
  *--top = nullptr;                            // rbp: nobody called
  *--top = nullptr;                            // rbx
  *--top = argument;                           // r12
  *--top = reinterpret_cast<void*>(function);  // r13
  *--top = nullptr;                            // r14
  *--top = nullptr;                            // r15
  inside_ = top;
}

void Fiber::enter() { simt_switch(&outside_, inside_); }
void Fiber::leave() { simt_switch(&inside_, outside_); }

#else

namespace {

// makecontext passes ints only.
void begin(unsigned function_low, unsigned function_high, unsigned argument_low, unsigned argument_high) {
  const auto join = [](unsigned low, unsigned high) {
    return static_cast<std::uintptr_t>(std::uint64_t{high} << 32 | low);
  };
  reinterpret_cast<void (*)(void*)>(join(function_low, function_high))(
      reinterpret_cast<void*>(join(argument_low, argument_high)));
}

}  // namespace

void Fiber::start(void (*function)(void*), void* argument) {
  if (stack_ == nullptr) stack_ = Stack::take();
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = Stack::kBytes;
  inside_.uc_link = nullptr;
  const auto to = reinterpret_cast<std::uint64_t>(function);
  const auto with = reinterpret_cast<std::uint64_t>(argument);
  makecontext(&inside_, reinterpret_cast<void (*)()>(&begin), 4, static_cast<unsigned>(to),
              static_cast<unsigned>(to >> 32), static_cast<unsigned>(with), static_cast<unsigned>(with >> 32));
}

void Fiber::enter() { swapcontext(&outside_, &inside_); }
void Fiber::leave() { swapcontext(&inside_, &outside_); }

#endif

}  // namespace simt
