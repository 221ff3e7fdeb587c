// SPDX-License-Identifier: MIT OR GPL-2.0
/* Write sections of the mmap lock and the system calls they belong to. */

/* Number, ABI and arguments of the system call in flight; the number is ~0 in a fault. */
static __always_inline u64 read_call(u64 regs, u64 *args, u32 *abi)
{
	u64 task = bpf_get_current_task();

	return compat_read_call(task, regs, args, abi);
}

/* Low byte: class of the native call with this number; high byte: of the 32-bit one. */
static __always_inline u32 classes_of(u64 nr)
{
	u32 at = nr;
	u16 *found;

	if (nr > 1023)
		return 0;
	found = op_classes.lookup(&at);
	return found ? *found : 0;
}

static __always_inline void ranges_of_call(struct space *s, u64 *args, u64 regs, u64 mm)
{
	u64 pair[2] = {}, brk;

	switch (s->op_class) {
	case OP_RANGE:
	case OP_MBIND:
		add_user_range(s, args[0], args[1]);
		break;
	case OP_MMAP:
		if (args[0])
			add_user_range(s, args[0], args[1]);
		break;
	case OP_BRK:
		brk = read_word(mm + OFF_mm_brk);
		if (args[0] < read_word(mm + OFF_mm_start_brk) || args[0] == brk)
			add_user_range(s, brk, 1);	/* only asks */
		else if (args[0] > brk)
			add_user_range(s, brk, args[0] - brk);
		else
			add_user_range(s, args[0], brk - args[0]);
		break;
	case OP_MREMAP:
		if (args[3] & 2)	/* MREMAP_FIXED */
			add_user_range(s, args[4], args[2]);
		add_user_range(s, args[0], args[1] > args[2] ? args[1] : args[2]);
		break;
	case OP_UFFD:
		read_user(pair, 16, (void *)args[2]);
		add_user_range(s, pair[0], pair[1]);
		break;
	case OP_WHOLE:
	case OP_OTHER:
	case OP_VECTOR:
	case OP_OLD_MMAP:
		set_range(s, 0, 0, ADDR_END);
		break;
	case OP_ATTACH:	/* SHM_RND rounds the address down, by no more than 64 KiB */
		if (args[1])
			add_user_range(s, args[1] & ~0xffffULL, (1ULL << 60) - 1);
		break;
	case OP_FROM:
		add_user_range(s, args[0], (1ULL << 60) - 1);
		break;
	case OP_FAULT:
		add_user_range(s, compat_stack_pointer(regs), 1);
		break;
	}
}

static __always_inline void begin_section(struct space *s, u32 tid)
{
	s->open_tid = tid;
	s->seq++;
	s->n = 1;
	s->evidence = 0;
	s->part = 0;
	s->broken = 0;
	s->downgraded = 0;
	s->finished = 1;
	s->ranges = 0;
	s->current_range = 0;
	s->rows = 0;
	s->cover_flags = 0;
	s->store_lo = ADDR_END;
	s->store_hi = 0;
	s->arg = 0;
	s->kind = KIND_SECTION;
	s->acquired = bpf_ktime_get_ns();
}

static __always_inline void note_foreign(u32 tid, u64 mm, int entering)
{
	int zero = 0;
	u64 *open = foreign_open.lookup(&zero);

	if (!open || mm == current_mm())
		return;
	if (entering) {
		foreign_mm.update(&tid, &mm);
		__sync_fetch_and_add(open, 1);
	} else if (foreign_mm.lookup(&tid)) {
		foreign_mm.delete(&tid);
		__sync_fetch_and_add(open, -1);
	}
}

HOOK(mmap_lock_acquire_returned)
{
	u64 mm = ctx->args[0], args[6] = {}, regs, nr;
	u32 tid = bpf_get_current_pid_tgid(), abi = 0;
	struct space *s;

	s = spaces.lookup(&mm);
	if (!s)
		return 0;
	if (!(ctx->args[MMAP_LOCK_WRITE] & 0xff)) {
		if (s->open_tid == tid)
			s->downgraded = 1;
		return 0;
	}
	if (!(ctx->args[MMAP_LOCK_WRITE + 1] & 0xff))
		return 0;
	begin_section(s, tid);
	if (read_half(mm + OFF_mm_mm_users) == 0) {	/* exit_mmap: the last look at the whole tree */
		s->kind = KIND_LAST;
		s->dead = 1;
		s->op_class = 0;
		s->nr = 0;
		set_range(s, 0, 0, ADDR_END);
	} else {
		note_foreign(tid, mm, 1);
		regs = compat_task_regs();
		nr = read_call(regs, args, &abi);
		s->nr = nr;
		s->abi = abi;
		s->op_class = classes_of(nr) >> (abi ? 8 : 0);
		if (nr > 0xffff)
			s->op_class = OP_FAULT;
		ranges_of_call(s, args, regs, mm);
	}
	s->role = CELL_BEFORE;
	if (!s->ranges) {
		add_cover(s, mm, 0, 0);
		return 0;
	}
	s->root_at = mm + OFF_mm_ma_root;
	start_range(s);
	walker.call(ctx, 0);
	return 0;
}

/* The place the kernel chose for a mapping without an address: its neighbours, before the tree changes. */
HOOK(vm_unmapped_area)
{
	u64 addr = ctx->args[0], mm = current_mm(), length;
	struct space *s;

	if (addr & (PAGE_BYTES - 1))
		return 0;	/* an errno */
	s = spaces.lookup(&mm);
	if (!s || s->open_tid != (u32)bpf_get_current_pid_tgid() || s->ranges > 2)
		return 0;
	length = read_word(ctx->args[1] + OFF_unmapped_length);
	s->current_range = s->ranges;
	add_user_range(s, addr, length);
	if (s->ranges == s->current_range)
		return 0;
	s->role = CELL_BEFORE;
	s->root_at = mm + OFF_mm_ma_root;
	start_range(s);
	walker.call(ctx, 0);
	return 0;
}

HOOK(mmap_lock_released)
{
	u64 mm = ctx->args[0];
	u32 tid = bpf_get_current_pid_tgid(), write = ctx->args[MMAP_LOCK_WRITE] & 0xff;
	struct space *s;

	s = spaces.lookup(&mm);
	if (!s || s->open_tid != tid || (!write && !s->downgraded))
		return 0;
	s->role = CELL_AFTER;
	s->cover_flags = 0;
	s->rows = 0;
	if (s->dead)
		return 0;
	note_foreign(tid, mm, 0);
	/* Unknown cause, or a range nobody told: flags may have changed anywhere, which no store shows. */
	if (s->dirty || s->op_class == OP_NONE || (!s->ranges && s->op_class != OP_FORK && !s->store_hi)) {
		s->dirty = 0;
		set_range(s, 0, 0, ADDR_END);
	} else if (s->store_hi) {
		if (s->ranges > 2)
			set_range(s, 0, 0, ADDR_END);
		else
			set_range(s, s->ranges, s->store_lo, s->store_hi);
	}
	s->current_range = 0;
	if (!s->ranges) {
		add_cover(s, mm, 0, 0);
		close_section(s);
		return 0;
	}
	s->root_at = mm + OFF_mm_ma_root;
	start_range(s);
	walker.call(ctx, 0);
	return 0;
}

/*
 * The command's process says who it is by a prctl() that no kernel knows, with the recorder's secret: it cannot tell
 * its PID of the initial namespace otherwise.
 */
static __always_inline void follow_announced(u64 regs)
{
	u64 args[6] = {}, secret = setting(SETTING_SECRET);
	u32 abi = 0, tgid = bpf_get_current_pid_tgid() >> 32, on = 1;

	read_call(regs, args, &abi);
	if (secret && args[0] == ANNOUNCE && args[1] == secret)
		traced_tgids.update(&tgid, &on);
}

/* capable(CAP_IPC_LOCK): the bit counts in the initial user namespace only. */
static __always_inline u64 may_lock(void)
{
	u64 cred = read_word(bpf_get_current_task() + OFF_task_cred);

	if (read_half(read_word(cred + OFF_cred_user_ns) + OFF_user_ns_level))
		return 0;
	return read_word(cred + OFF_cred_cap_effective) >> CAP_IPC_LOCK & 1;
}

/* What arguments point to stands in arguments that the call does not use: USER_ARGUMENTS in schema.py. */
static __always_inline void read_user_arguments(u8 class, u64 *args, u64 mm)
{
	u64 pointer;
	u32 words[6];

	switch (class) {
	case OP_LIMITS:
		args[4] = args[5] = ADDR_END;
		pointer = args[2] ? args[2] : args[1];
		if (pointer > 4096)
			read_user(&args[4], 16, (void *)pointer);
		break;
	case OP_EXEC:
		args[4] = read_word(mm + OFF_mm_end_data) - read_word(mm + OFF_mm_start_data);
		args[5] = may_lock();
		break;
	case OP_CREDENTIALS:
		args[5] = may_lock();
		break;
	case OP_UFFD:
		args[3] = args[4] = args[5] = 0;
		read_user(&args[3], 24, (void *)args[2]);
		break;
	case OP_MBIND:
		pointer = args[3];
		args[3] = 0;
		if (pointer)
			read_user(&args[3], 8, (void *)pointer);
		break;
	case OP_VECTOR:
		pointer = args[1];
		args[1] = args[5] = 0;
		read_user(&args[1], 8, (void *)pointer);
		read_user(&args[5], 8, (void *)(pointer + 8));
		break;
	case OP_OLD_MMAP:
		if (read_user(words, 24, (void *)args[0]))
			break;
		args[0] = words[0];
		args[1] = words[1];
		args[2] = words[2];
		args[3] = words[3];
		args[4] = words[4];
		args[5] = words[5];
		break;
	}
}

/* The file that a failed mmap named: nothing else in the trace would tell what it was refused for. */
static __always_inline u64 file_of_failed_mmap(u8 class, u64 *args, u64 result)
{
	u64 files, table, file;
	u32 fd = args[4];

	if ((class != OP_MMAP && class != OP_OLD_MMAP) || (s64)result >= 0 || args[3] & MAP_ANONYMOUS)
		return 0;
	files = read_word(bpf_get_current_task() + OFF_task_files);
	table = read_word(files + OFF_files_fdt);
	if (fd >= read_half(table + OFF_fdt_max_fds))
		return 0;
	file = read_word(read_word(table + OFF_fdt_fd) + fd * 8ULL);
	if (file && !seen_before(file))
		describe_file(file);
	return file;
}

HOOK(sys_exit)
{
	u64 regs = ctx->args[0], args[6] = {}, nr, mm, cells[16];
	u32 abi = 0, classes;
	struct space *s;
	u8 class;

	nr = compat_call_number(regs);
	classes = classes_of(nr);
	if (!classes)
		return 0;
	if ((classes & 0xff) == OP_PRCTL)
		follow_announced(regs);
	mm = current_mm();
	s = spaces.lookup(&mm);
	if (!s)
		return 0;
	read_call(regs, args, &abi);
	class = classes >> (abi ? 8 : 0);
	if (!class)
		return 0;
	if (class == OP_UFFD && (args[1] >> 8 & 0xff) != 0xaa)
		return 0;
	if (class == OP_PRCTL && args[0] != 0x53564d41 && args[0] != 67 && args[0] != 35 && args[0] != 65)
		return 0;
	read_user_arguments(class, args, mm);
	cells[0] = 0;
	fill_head(cells, KIND_CALL | (u64)class << 16 | (u64)abi << 24 | nr << 32, PLACE(s), bpf_get_current_pid_tgid());
	cells[6] = ctx->args[1];
	cells[7] = file_of_failed_mmap(class, args, ctx->args[1]);
	cells[8] = CELL_ARGS;
	cells[9] = args[0];
	cells[10] = args[1];
	cells[11] = args[2];
	cells[12] = args[3];
	cells[13] = args[4];
	cells[14] = args[5];
	cells[15] = class == OP_EXEC ? 0 : user_stack(ctx, regs, abi);
	send_small(cells);
	return 0;
}
