/* SPDX-License-Identifier: MIT */
/*
 * A 32-bit program on a 64-bit kernel: 1,009 mprotects through int 0x80, without any 32-bit C library
 * (gcc -m32 -nostdlib -static). Its calls raise no per-syscall tracepoint, only raw_syscalls.
 *
 * compat32 [DUMP]: one area of 1,010 pages (1 new); each mprotect cuts its head page off (1,009 splits,
 * 1,009 calls, no merge); 101 holes by munmap of whole VMAs (101 unmaps); old_mmap and mmap2 once each
 * (2 new); brk up 3 pages (1 new) and down 1 (1 split, 1 unmap). Then the dump, then exit status 32.
 * In all: 4 new, 1,010 splits, 102 unmaps, no merge, besides what exec does (compat32 --baseline).
 */
#ifndef __i386__
#error "build with -m32"
#endif

enum {
	NR_exit = 1, NR_read = 3, NR_write = 4, NR_open = 5, NR_brk = 45, NR_old_mmap = 90, NR_munmap = 91,
	NR_mprotect = 125, NR_mmap2 = 192,
	RO = 1, RW = 3, PRIVATE_ANON = 0x22, NORESERVE = 0x4000, SHARED_ANON = 0x21,
	CUTS = 1009, HOLES = 101, PAGE = 4096, CREATE = 0x241,
};

static long call6(long number, long a, long b, long c, long d, long e, long f)
{
	long result;

	/* The sixth argument goes in ebp, which the compiler wants for itself. */
	asm volatile("push %%ebp\n\tmov %7, %%ebp\n\tint $0x80\n\tpop %%ebp"
		     : "=a"(result)
		     : "0"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e), "m"(f)
		     : "memory");
	return result;
}

static long call3(long number, long a, long b, long c)
{
	long result;

	asm volatile("int $0x80" : "=a"(result) : "0"(number), "b"(a), "c"(b), "d"(c) : "memory");
	return result;
}

static void __attribute__((noreturn)) leave(int status)
{
	for (;;)
		call3(NR_exit, status, 0, 0);
}

static void check(int good, int status)
{
	if (!good)
		leave(status);
}

static void dump(const char *path)
{
	static char text[16384];
	long got, in, out;

	in = call3(NR_open, (long)"/proc/self/maps", 0, 0);
	out = call3(NR_open, (long)path, CREATE, 0644);
	check(in >= 0 && out >= 0, 95);
	while ((got = call3(NR_read, in, (long)text, sizeof(text))) > 0)
		check(call3(NR_write, out, (long)text, got) == got, 96);
}

static void __attribute__((noreturn, used)) run(long *stack)
{
	long argc = stack[0], at, heap;
	long old_form[6] = { 0, 2 * PAGE, RO, SHARED_ANON, -1, 0 };

	if (argc > 1 && ((char *)stack[2])[0] == '-')
		leave(32);
	at = call6(NR_mmap2, 0, (CUTS + 1) * PAGE, RW, PRIVATE_ANON | NORESERVE, -1, 0);
	check(at > 0 || at < -4095, 91);
	for (long i = 0; i < CUTS; i++)
		check(call3(NR_mprotect, at + i * PAGE, PAGE, i % 2 ? 0 : RO) == 0, 92);
	for (long i = 0; i < HOLES; i++)
		check(call3(NR_munmap, at + (4 * i + 1) * PAGE, PAGE, 0) == 0, 93);
	check((unsigned long)call3(NR_old_mmap, (long)old_form, 0, 0) < -4095ul, 94);
	check((unsigned long)call6(NR_mmap2, 0, PAGE, RO, SHARED_ANON, -1, 0) < -4095ul, 94);
	heap = call3(NR_brk, 0, 0, 0);
	check(call3(NR_brk, heap + 3 * PAGE, 0, 0) == heap + 3 * PAGE, 97);
	check(call3(NR_brk, heap + 2 * PAGE, 0, 0) == heap + 2 * PAGE, 97);
	if (argc > 1)
		dump((const char *)stack[2]);
	leave(32);
}

asm(".globl _start\n_start:\n\tmov %esp, %eax\n\tpush %eax\n\tcall run\n");
