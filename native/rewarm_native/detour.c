/* The thread gets a signal frame, as if a handler had interrupted it, below its stack pointer, and its registers are
 * pointed at a `syscall; ret` that its libc has anyway. The `ret` leads to the code there that ends handlers:
 * rt_sigreturn(2) then has the kernel put back everything. One ptrace request does it, so there is no moment at which
 * the thread needs its tracer in order to come back.
 *
 * The stack is used as a signal would use it, which the kernel may deliver to the thread at the same place.
 */
#include "detour.h"
#include "tracing.h"

#include <errno.h>

#ifndef __x86_64__

int rw_find_way(pid_t tid, struct rw_way *way)
{
	(void)tid;
	(void)way;
	return -ENOSYS;
}

int rw_send(pid_t tid, const struct rw_way *way, uint64_t number, const uint64_t arguments[3], uint64_t *stack)
{
	(void)tid;
	(void)way;
	(void)number;
	(void)arguments;
	(void)stack;
	return -ENOSYS;
}

bool rw_is_detour(uint64_t call, uint64_t number, uint64_t stack)
{
	(void)call;
	(void)number;
	(void)stack;
	return false;
}

#else

#include <cpuid.h>
#include <elf.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <ucontext.h>

/* asm/sigcontext.h, asm/ucontext.h and asm/elf.h: they clash with the headers of glibc, or are too new. */
enum {
	XSTATE_MAGIC1 = 0x46505853,
	XSTATE_MAGIC2 = 0x46505845,
	XSTATE_SOFTWARE = 464, /* where the kernel says in a frame what of the state it holds */
	XSTATE_HEADER = 512,
	XSTATE_SMALLEST = 576,
	XSTATE_LEAF = 0xd, /* of cpuid */
	XSTATE_ALWAYS = 3, /* x87 and SSE, which have their place before the header */
	UC_EXTENDED_STATE = 1,
	UC_STACK_SEGMENT = 2,
	UC_STRICT_STACK_SEGMENT = 4,
	NO_STACK_FLAGS = 0x7777, /* no sigaltstack(2) has these: it is left alone then */
	SHADOW_STACK_REGISTER = 0x204,
	RED_ZONE = 128,
	ALIGNMENT = 64, /* of the extended state */
	XSTATE_LARGEST = 16384,
};

static const unsigned char CALL[] = { 0x0f, 0x05, 0xc3 };                                         /* syscall; ret */
static const unsigned char RESTORER[] = { 0x48, 0xc7, 0xc0, SYS_rt_sigreturn, 0, 0, 0, 0x0f, 0x05 }; /* mov, syscall */

struct software {
	uint32_t magic, size_with_magic;
	uint64_t features;
	uint32_t size, padding[7];
};

/* On the stack of the thread; the kernel reads no further than the first word of the signal mask. */
struct frame {
	uint64_t back;
	unsigned char context[offsetof(ucontext_t, uc_sigmask) + sizeof(uint64_t)];
	uint64_t padding;
	unsigned char state[XSTATE_LARGEST + sizeof(uint32_t)];
};

_Static_assert(offsetof(struct frame, state) % ALIGNMENT == 0, "the state lies on its alignment if the frame does");
_Static_assert(sizeof(struct software) == XSTATE_HEADER - XSTATE_SOFTWARE, "as the kernel has it");

int rw_find_way(pid_t tid, struct rw_way *way)
{
	/* Other libraries may be gigabytes; a program without a libc of its own is linked statically. */
	static const char *const names[] = { "/libc.so", "/libc-2.", "/ld-musl-", "", NULL };
	int error = rw_find_code(tid, CALL, sizeof(CALL), names, &way->call);

	return error < 0 ? error : rw_find_code(tid, RESTORER, sizeof(RESTORER), names, &way->restorer);
}

static bool holds(pid_t tid, uint64_t address, const unsigned char *code, size_t size)
{
	unsigned char found[sizeof(RESTORER)];

	return rw_read_memory(tid, address, found, size) == 0 && memcmp(found, code, size) == 0;
}

/* With a shadow stack the `ret` would be a fault. */
static bool has_shadow_stack(pid_t tid)
{
	uint64_t pointer;
	struct iovec data = { &pointer, sizeof(pointer) };

	return rw_trace(PTRACE_GETREGSET, tid, SHADOW_STACK_REGISTER, &data) == 0;
}

/* Where the last part ends that is not in its initial state: a frame with more than the thread may use is not taken. */
static size_t state_size(uint64_t features)
{
	size_t end = XSTATE_SMALLEST;

	for (unsigned int i = 2; i < 63; i++) {
		unsigned int size, offset, flags, unused;

		if ((features >> i & 1) == 0)
			continue;
		__cpuid_count(XSTATE_LEAF, i, size, offset, flags, unused);
		if (offset + size > end)
			end = offset + size;
	}
	return end;
}

/* Sets *size to how much of frame->state is used. */
static int save_state(pid_t tid, struct frame *frame, size_t *size)
{
	const uint32_t magic = XSTATE_MAGIC2;
	struct iovec data = { frame->state, XSTATE_LARGEST };
	struct software software = { .magic = XSTATE_MAGIC1 };
	int error = rw_trace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, &data);

	if (error < 0)
		return error;
	memcpy(&software.features, frame->state + XSTATE_HEADER, sizeof(software.features));
	software.features |= XSTATE_ALWAYS;
	*size = state_size(software.features);
	if (*size > data.iov_len)
		return -ENOSYS;
	software.size = (uint32_t)*size;
	software.size_with_magic = (uint32_t)(*size + sizeof(magic));
	memcpy(frame->state + XSTATE_SOFTWARE, &software, sizeof(software));
	memcpy(frame->state + *size, &magic, sizeof(magic));
	*size += sizeof(magic);
	return 0;
}

static void save_registers(ucontext_t *context, const struct user_regs_struct *from)
{
	greg_t *to = context->uc_mcontext.gregs;

	to[REG_R8] = (greg_t)from->r8;
	to[REG_R9] = (greg_t)from->r9;
	to[REG_R10] = (greg_t)from->r10;
	to[REG_R11] = (greg_t)from->r11;
	to[REG_R12] = (greg_t)from->r12;
	to[REG_R13] = (greg_t)from->r13;
	to[REG_R14] = (greg_t)from->r14;
	to[REG_R15] = (greg_t)from->r15;
	to[REG_RDI] = (greg_t)from->rdi;
	to[REG_RSI] = (greg_t)from->rsi;
	to[REG_RBP] = (greg_t)from->rbp;
	to[REG_RBX] = (greg_t)from->rbx;
	to[REG_RDX] = (greg_t)from->rdx;
	to[REG_RAX] = (greg_t)from->rax;
	to[REG_RCX] = (greg_t)from->rcx;
	to[REG_RSP] = (greg_t)from->rsp;
	to[REG_RIP] = (greg_t)from->rip;
	to[REG_EFL] = (greg_t)from->eflags;
	to[REG_CSGSFS] = (greg_t)(from->cs | from->ss << 48); /* gs and fs are not looked at */
}

static int save_context(pid_t tid, struct frame *frame, const struct user_regs_struct *registers, uint64_t at)
{
	ucontext_t context = { .uc_flags = UC_EXTENDED_STATE | UC_STACK_SEGMENT | UC_STRICT_STACK_SEGMENT };
	uint64_t mask;
	int error = rw_trace(PTRACE_GETSIGMASK, tid, sizeof(mask), &mask);

	if (error < 0)
		return error;
	context.uc_stack.ss_flags = NO_STACK_FLAGS;
	context.uc_mcontext.fpregs = (fpregset_t)(uintptr_t)(at + offsetof(struct frame, state));
	save_registers(&context, registers);
	memcpy(&context.uc_sigmask, &mask, sizeof(mask));
	memcpy(frame->context, &context, sizeof(frame->context));
	return 0;
}

int rw_send(pid_t tid, const struct rw_way *way, uint64_t number, const uint64_t arguments[3], uint64_t *stack)
{
	struct user_regs_struct registers = { 0 };
	struct frame frame = { .back = way->restorer };
	size_t size = 0;
	int error = rw_trace(PTRACE_GETREGS, tid, 0, &registers);

	if (error == 0 && (registers.cs != RW_USER_CODE_64 || has_shadow_stack(tid)))
		error = -ENOSYS;
	/* The program may have unmapped it, or be another by now. */
	if (error == 0 && !(holds(tid, way->call, CALL, sizeof(CALL)) &&
			    holds(tid, way->restorer, RESTORER, sizeof(RESTORER))))
		error = -ENOEXEC;
	if (error == 0)
		error = save_state(tid, &frame, &size);
	if (error < 0)
		return error;

	size += offsetof(struct frame, state);
	*stack = (registers.rsp - RED_ZONE - size) & ~(uint64_t)(ALIGNMENT - 1);
	error = save_context(tid, &frame, &registers, *stack);
	if (error == 0)
		error = rw_write_memory(tid, *stack, &frame, size);
	if (error < 0)
		return error;

	registers.rsp = *stack;
	registers.rip = way->call;
	registers.rax = number;
	registers.orig_rax = UINT64_MAX; /* no call that a signal would restart, whatever rax is */
	registers.rdi = arguments[0];
	registers.rsi = arguments[1];
	registers.rdx = arguments[2];
	return rw_trace(PTRACE_SETREGS, tid, 0, &registers);
}

bool rw_is_detour(uint64_t call, uint64_t number, uint64_t stack)
{
	/* `ret` has taken a word by then. */
	return (call == number && stack == 0) || (call == SYS_rt_sigreturn && stack == sizeof(uint64_t));
}

#endif
