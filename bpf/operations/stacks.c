// SPDX-License-Identifier: MIT OR GPL-2.0
/* User stacks of calls, on request: one number a call, its return addresses once in a map. */

#ifdef USER_STACKS
#define STACK_FRAMES	64
#define STACK_LOST	(0xffffULL << 48)
#define ADDRESS_MASK	((1ULL << 48) - 1)

struct user_stack {
	u64 address[STACK_FRAMES];
};

BPF_TABLE("stacktrace", u32, struct user_stack, user_stacks, USER_STACKS);

/*
 * Who called the library's wrapper: that keeps no frame pointer, so the chain of them lacks its caller. Where its
 * return address should be may stand anything else; only what follows a call instruction leaves the kernel.
 */
static __always_inline u64 caller_of_leaf(u64 regs, u32 abi)
{
	u64 address = compat_leaf_return(regs, abi) & ADDRESS_MASK;
	u8 code[8] = {};

	if (address < PAGE_BYTES || read_user(code, 8, (void *)(address - 8)) || !compat_is_call(code))
		return 0;
	return address;
}

/* Number of the stack plus one in the upper 16 bits, in the others the caller of the function that made the call. */
static __always_inline u64 user_stack(struct bpf_raw_tracepoint_args *ctx, u64 regs, u32 abi)
{
	s64 number = user_stacks.get_stackid(ctx, BPF_F_USER_STACK);

	if (number == -14)	/* EFAULT: no user stack */
		return 0;
	if (number < 0)
		return STACK_LOST;
	return (u64)(number + 1) << 48 | caller_of_leaf(regs, abi);
}
#else
static __always_inline u64 user_stack(struct bpf_raw_tracepoint_args *ctx, u64 regs, u32 abi)
{
	return 0;
}
#endif
