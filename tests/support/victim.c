/* A process for tests/unit/test_gpu_advise.py: its second thread does what it is told on stdin, a line at a time, and
 * answers on stdout. That thread takes SIGUSR1, and says so on stderr.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, READ_WRITE = PROT_READ | PROT_WRITE, ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS };

static sem_t wanted, made;
static size_t size_for_main;
static char *area_of_main;
static volatile int looping = 1;

static void on_signal(int number)
{
	(void)number;
	if (write(2, "s", 1) != 1)
		abort();
}

static void on_end(int number)
{
	(void)number;
	looping = 0;
}

static char *map(size_t size, int protection, int flags, int fd)
{
	char *area = mmap(NULL, size, protection, flags, fd, 0);

	if (area == MAP_FAILED)
		abort();
	for (size_t at = 0; (protection & PROT_WRITE) != 0 && at < size; at += PAGE)
		area[at] = 1;
	return area;
}

struct around {
	char before[3 * 64], after[3 * 64];   /* vector registers: at 0 and 192 */
	uint64_t rcx, rip, low, high;         /* at 384; the latter two of the red zone */
	uint32_t control_after, word_after;   /* at 416 */
	uint32_t control, word;               /* at 424: MXCSR (rounds up) and control word of the x87 */
} __attribute__((aligned(64)));

/* Whether an mmap(2) leaves general registers alone, and succeeds; what it does to others is in `around`. */
__attribute__((noinline)) static int cross(struct around *around)
{
	const uint64_t size = 64 << 20;
	uint64_t result = SYS_mmap, rdi = 0, rsi = size, rdx = READ_WRITE;
	register uint64_t r10 __asm__("r10") = ANONYMOUS | MAP_POPULATE;
	register uint64_t r8 __asm__("r8") = UINT64_MAX;
	register uint64_t r9 __asm__("r9") = 0;
	register uint64_t r12 __asm__("r12") = 0x1212;
	register uint64_t r13 __asm__("r13") = 0x1313;
	register uint64_t r14 __asm__("r14") = 0x1414;
	register uint64_t r15 __asm__("r15") = 0x1515;

	__asm__ volatile(
		"vmovdqu (%%rbx), %%ymm0\nvmovdqu 64(%%rbx), %%ymm15\n"
		"ldmxcsr 424(%%rbx)\nfldcw 428(%%rbx)\n"
		"movq %%r12, -8(%%rsp)\nmovq %%r13, -128(%%rsp)\n"
		"syscall\n1:\n"
		"movq %%rcx, 384(%%rbx)\nleaq 1b(%%rip), %%rcx\nmovq %%rcx, 392(%%rbx)\n"
		"movq -8(%%rsp), %%rcx\nmovq %%rcx, 400(%%rbx)\nmovq -128(%%rsp), %%rcx\nmovq %%rcx, 408(%%rbx)\n"
		"stmxcsr 416(%%rbx)\nfnstcw 420(%%rbx)\n"
		"vmovdqu %%ymm0, 192(%%rbx)\nvmovdqu %%ymm15, 256(%%rbx)\n"
		: "+a"(result), "+D"(rdi), "+S"(rsi), "+d"(rdx), "+r"(r10), "+r"(r8), "+r"(r9), "+r"(r12), "+r"(r13),
		  "+r"(r14), "+r"(r15)
		: "b"(around)
		: "rcx", "r11", "xmm0", "xmm15", "memory");
	return rdi == 0 && rsi == size && rdx == READ_WRITE && r10 == (ANONYMOUS | MAP_POPULATE) && r8 == UINT64_MAX && r9 == 0 &&
	       r12 == 0x1212 && r13 == 0x1313 && r14 == 0x1414 && r15 == 0x1515 && result < (uint64_t)-PAGE;
}

/* Bits for what an mmap(2) changed that it must not change: 0. */
static int registers(void)
{
	static struct around at = { .control = 0x5fa0, .word = 0x0b7f };
	const int avx512 = __builtin_cpu_supports("avx512f");
	sigset_t mask, mask_after;
	stack_t stack, stack_after;
	int wrong;

	for (size_t i = 0; i < sizeof(at.before); i++)
		at.before[i] = (char)(i * 7 + 1);
	memset(at.after, 0, sizeof(at.after));
	pthread_sigmask(SIG_BLOCK, NULL, &mask);
	sigaltstack(NULL, &stack);
	if (avx512)
		__asm__ volatile("vmovdqu64 %0, %%zmm31" : : "m"(at.before[128]));
	wrong = cross(&at) ? 0 : 1;
	if (avx512)
		__asm__ volatile("vmovdqu64 %%zmm31, %0" : : "m"(at.after[128]) : "memory");
	_mm_setcsr(0x1f80);
	__asm__ volatile("fninit");
	pthread_sigmask(SIG_BLOCK, NULL, &mask_after);
	sigaltstack(NULL, &stack_after);

	wrong |= at.rcx != at.rip ? 2 : 0;
	wrong |= at.low != 0x1212 || at.high != 0x1313 ? 4 : 0;
	wrong |= at.control_after != at.control || at.word_after != at.word ? 8 : 0;
	wrong |= memcmp(at.before, at.after, 32) != 0 || memcmp(at.before + 64, at.after + 64, 32) != 0 ? 16 : 0;
	wrong |= avx512 && memcmp(at.before + 128, at.after + 128, 64) != 0 ? 32 : 0;
	wrong |= memcmp(&mask, &mask_after, sizeof(uint64_t)) != 0 ? 64 : 0;
	wrong |= stack.ss_sp != stack_after.ss_sp || stack.ss_size != stack_after.ss_size ||
				 stack.ss_flags != stack_after.ss_flags ? 128 : 0;
	return wrong;
}

/* Maps until SIGUSR2: says how often, and how often its first pages took only the faults of a huge one. */
static void loop(size_t size)
{
	size_t times = 0, huge = 0;

	looping = 1;
	puts("loops");
	for (; looping; times++) {
		struct rusage before, after;
		char *area = mmap(NULL, size, READ_WRITE, ANONYMOUS, -1, 0);
		char *start = area + (-(uintptr_t)area & ((2 << 20) - 1));

		if (area == MAP_FAILED)
			abort();
		getrusage(RUSAGE_THREAD, &before);
		for (size_t at = 0; at < 16; at++) {
			if (start[at * PAGE] != 0)
				abort();
			start[at * PAGE] = 1;
		}
		getrusage(RUSAGE_THREAD, &after);
		huge += after.ru_minflt - before.ru_minflt < 4;
		if (munmap(area, size) != 0)
			abort();
	}
	printf("%zu %zu\n", times, huge);
}

static void sleep_for(long milliseconds)
{
	struct timespec length = { milliseconds / 1000, milliseconds % 1000 * 1000000 }, start, end;
	int result;

	clock_gettime(CLOCK_MONOTONIC, &start);
	result = nanosleep(&length, NULL); /* relative, so by restart_syscall(2) */
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%d %ld\n", result, (end.tv_sec - start.tv_sec) * 1000 + (end.tv_nsec - start.tv_nsec) / 1000000);
}

static void deny_madvise(void)
{
	struct sock_filter rules[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { 4, rules };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
		abort();
}

static void *work(void *none)
{
	char word[32];
	size_t number;
	sigset_t own;

	sigemptyset(&own);
	sigaddset(&own, SIGUSR1);
	sigaddset(&own, SIGUSR2);
	pthread_sigmask(SIG_UNBLOCK, &own, NULL);
	printf("%d\n", (int)syscall(SYS_gettid));
	while (scanf("%31s %zu", word, &number) == 2) {
		if (strcmp(word, "private") == 0)
			printf("%p\n", (void *)map(number, READ_WRITE, ANONYMOUS, -1));
		else if (strcmp(word, "populated") == 0)
			printf("%p\n", (void *)map(number, READ_WRITE, ANONYMOUS | MAP_POPULATE, -1));
		else if (strcmp(word, "shared") == 0)
			printf("%p\n", (void *)map(number, READ_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1));
		else if (strcmp(word, "readonly") == 0)
			printf("%p\n", (void *)map(number, PROT_READ, ANONYMOUS, -1));
		else if (strcmp(word, "file") == 0) {
			int fd = memfd_create("file", 0);

			if (ftruncate(fd, (off_t)number) != 0)
				abort();
			printf("%p\n", (void *)map(number, READ_WRITE, MAP_PRIVATE, fd));
		} else if (strcmp(word, "main") == 0) {
			size_for_main = number;
			sem_post(&wanted);
			sem_wait(&made);
			printf("%p\n", (void *)area_of_main);
		} else if (strcmp(word, "registers") == 0)
			printf("%d\n", registers());
		else if (strcmp(word, "loop") == 0)
			loop(number);
		else if (strcmp(word, "sleep") == 0)
			sleep_for((long)number);
		else if (strcmp(word, "seccomp") == 0) {
			deny_madvise();
			puts("denied");
		} else if (strcmp(word, "exec") == 0)
			execl("/bin/cat", "cat", (char *)NULL);
		else if (strcmp(word, "exec-main") == 0) {
			sem_post(&wanted);
			pause();
		} else if (strcmp(word, "exit") == 0) {
			puts("over");
			return none;
		} else if (strcmp(word, "calls") == 0) {
			struct timespec start, end;

			clock_gettime(CLOCK_MONOTONIC, &start);
			for (size_t i = 0; i < number; i++)
				syscall(SYS_getppid);
			clock_gettime(CLOCK_MONOTONIC, &end);
			printf("%ld\n", (end.tv_sec - start.tv_sec) * 1000000 + (end.tv_nsec - start.tv_nsec) / 1000);
		}
	}
	exit(0);
}

int main(void)
{
	pthread_t thread;
	sigset_t other;

	setvbuf(stdin, NULL, _IONBF, 0);
	setvbuf(stdout, NULL, _IONBF, 0);
	sem_init(&wanted, 0, 0);
	sem_init(&made, 0, 0);
	signal(SIGUSR1, on_signal);
	signal(SIGUSR2, on_end);
	sigemptyset(&other);
	sigaddset(&other, SIGUSR1);
	sigaddset(&other, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &other, NULL);
	if (pthread_create(&thread, NULL, work, NULL) != 0)
		return 1;
	for (;;) {
		while (sem_wait(&wanted) != 0)
			;
		if (size_for_main == 0)
			execl("/bin/cat", "cat", (char *)NULL);
		area_of_main = map(size_for_main, READ_WRITE, ANONYMOUS, -1);
		sem_post(&made);
	}
}
