/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* The one place where architectures and kernel builds differ; everything else reads plain offsets. */
#ifndef VMA_COMPAT_H
#define VMA_COMPAT_H

/* bpf_probe_read_user under a name of ours: bcc reads all of kallsyms anew at each call that it knows by that one. */
static long (*read_user)(void *to, u32 size, const void *from) = (void *)BPF_FUNC_probe_read_user;

/* Newer compilers drop a mask that they can prove needless, and the verifier cannot prove it: hide the value. */
static __always_inline u64 hidden(u64 value)
{
	asm volatile("" : "+r"(value));
	return value;
}

/* Kernels that keep a VMA's lock in an object of its own allocate it beside the VMA; it is the smaller one. */
static __always_inline int compat_is_vma_cache(u64 cache)
{
#ifdef VMA_OBJECT_SIZE
	u32 size = 0;

	bpf_probe_read_kernel(&size, 4, (void *)(cache + OFF_kmem_cache_object_size));
	return size >= VMA_OBJECT_SIZE;
#else
	return 1;
#endif
}

#define MAPLE_LEAF	1
#define MAPLE_ARANGE	3

/* User registers of the task in flight, from entry to exit of the kernel. */
static __always_inline u64 compat_task_regs(void)
{
	return (u64)bpf_task_pt_regs(bpf_get_current_task_btf());
}

#if defined(ARCH_X86_64)
static __always_inline u64 compat_call_number(u64 regs)
{
	u64 nr = 0;

	bpf_probe_read_kernel(&nr, 8, (void *)(regs + OFF_regs_orig_ax));
	return nr;
}

static __always_inline u64 compat_stack_pointer(u64 regs)
{
	u64 sp = 0;

	bpf_probe_read_kernel(&sp, 8, (void *)(regs + OFF_regs_sp));
	return sp;
}

/* A 32-bit call is known by TS_COMPAT in the thread's status (arch/x86/include/asm/thread_info.h). */
static __always_inline u64 compat_read_call(u64 task, u64 regs, u64 *args, u32 *abi)
{
	u64 r[(OFF_regs_orig_ax - OFF_regs_bp) / 8 + 1];
	u32 status = 0;

	if (bpf_probe_read_kernel(r, sizeof(r), (void *)(regs + OFF_regs_bp)))
		return ~0ULL;
	bpf_probe_read_kernel(&status, 4, (void *)(task + OFF_task_thread_status));
#define REG(name)	r[(OFF_regs_##name - OFF_regs_bp) / 8]
	*abi = status >> 1 & 1;
	if (*abi) {
		args[0] = (u32)REG(bx);
		args[1] = (u32)REG(cx);
		args[2] = (u32)REG(dx);
		args[3] = (u32)REG(si);
		args[4] = (u32)REG(di);
		args[5] = (u32)REG(bp);
	} else {
		args[0] = REG(di);
		args[1] = REG(si);
		args[2] = REG(dx);
		args[3] = REG(r10);
		args[4] = REG(r8);
		args[5] = REG(r9);
	}
	return REG(orig_ax);
}

/* Arguments of a probed function, at its first instruction: six in registers, then the stack above the way back. */
static __always_inline void compat_read_arguments(u64 regs, u64 *args)
{
	u64 sp = compat_stack_pointer(regs);

	bpf_probe_read_kernel(&args[0], 8, (void *)(regs + OFF_regs_di));
	bpf_probe_read_kernel(&args[1], 8, (void *)(regs + OFF_regs_si));
	bpf_probe_read_kernel(&args[2], 8, (void *)(regs + OFF_regs_dx));
	bpf_probe_read_kernel(&args[3], 8, (void *)(regs + OFF_regs_cx));
	bpf_probe_read_kernel(&args[4], 8, (void *)(regs + OFF_regs_r8));
	bpf_probe_read_kernel(&args[5], 8, (void *)(regs + OFF_regs_r9));
	bpf_probe_read_kernel(&args[6], 40, (void *)(sp + 8));
}

static __always_inline u64 compat_read_answer(u64 regs)
{
	u64 answer = 0;

	bpf_probe_read_kernel(&answer, 8, (void *)(regs + OFF_regs_ax));
	return answer;
}

/* The word where a function that has pushed nothing keeps its return address. */
static __always_inline u64 compat_leaf_return(u64 regs, u32 abi)
{
	u64 word = 0;

	read_user(&word, abi ? 4 : 8, (void *)compat_stack_pointer(regs));
	return word;
}

/* Whether eight bytes of text end in a call: e8 and a distance, or ff /2 in one of its lengths. */
static __always_inline int compat_is_call(u8 *code)
{
#define CALLS_BY_WORD(n)	(code[n] == 0xff && (code[n + 1] >> 3 & 7) == 2)
	return code[3] == 0xe8 || CALLS_BY_WORD(6) || CALLS_BY_WORD(5) || CALLS_BY_WORD(4) || CALLS_BY_WORD(2) ||
	       CALLS_BY_WORD(1);
}
#elif defined(ARCH_ARM64)
static __always_inline u64 compat_call_number(u64 regs)
{
	u32 nr = 0;

	bpf_probe_read_kernel(&nr, 4, (void *)(regs + OFF_regs_syscallno));
	return (u64)(long)(int)nr;
}

static __always_inline u64 compat_stack_pointer(u64 regs)
{
	u64 sp = 0;

	bpf_probe_read_kernel(&sp, 8, (void *)(regs + OFF_regs_sp));
	return sp;
}

/* x0 holds the result at exit; orig_x0 keeps the first argument. TIF_32BIT is bit 22 of the thread's flags. */
static __always_inline u64 compat_read_call(u64 task, u64 regs, u64 *args, u32 *abi)
{
	u64 r[6], flags = 0;

	if (bpf_probe_read_kernel(r, sizeof(r), (void *)regs))
		return ~0ULL;
	bpf_probe_read_kernel(&flags, 8, (void *)(task + OFF_task_thread_flags));
	*abi = flags >> 22 & 1;
	bpf_probe_read_kernel(&args[0], 8, (void *)(regs + OFF_regs_orig_x0));
	args[1] = r[1];
	args[2] = r[2];
	args[3] = r[3];
	args[4] = r[4];
	args[5] = r[5];
	return compat_call_number(regs);
}

/* Arguments of a probed function, at its first instruction: eight in registers, then the stack. */
static __always_inline void compat_read_arguments(u64 regs, u64 *args)
{
	bpf_probe_read_kernel(args, 64, (void *)regs);
	bpf_probe_read_kernel(&args[8], 24, (void *)compat_stack_pointer(regs));
}

static __always_inline u64 compat_read_answer(u64 regs)
{
	u64 answer = 0;

	bpf_probe_read_kernel(&answer, 8, (void *)regs);
	return answer;
}

/* The link register: the return address of a function that has called nothing. */
static __always_inline u64 compat_leaf_return(u64 regs, u32 abi)
{
	u64 word = 0;

	bpf_probe_read_kernel(&word, 8, (void *)(regs + (abi ? 14 : 30) * 8));
	return word;
}

/* Whether eight bytes of text end in bl or blr. */
static __always_inline int compat_is_call(u8 *code)
{
	u32 last = *(u32 *)(code + 4);

	return last >> 26 == 0x25 || (last & 0xfffffc1f) == 0xd63f0000;
}
#endif
#endif
