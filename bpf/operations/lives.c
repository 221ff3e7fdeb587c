// SPDX-License-Identifier: MIT OR GPL-2.0
/* Lives of address spaces and tasks: fork, exec, exit. */

static __always_inline struct space *new_space(u64 mm)
{
	struct space *blank, *s;
	int zero = 0;
	u64 *id;

	blank = blank_space.lookup(&zero);
	id = next_space.lookup(&zero);
	if (!blank || !id)
		return 0;
	if (spaces.update(&mm, blank)) {
		bump(COUNT_NO_SPACE);
		return 0;
	}
	s = spaces.lookup(&mm);
	if (s)
		s->id = __sync_fetch_and_add(id, 1) + 1;
	return s;
}

HOOK(sched_process_fork)
{
	u64 parent = ctx->args[0], child = ctx->args[1], mm, child_mm, cells[16] = {};
	struct space *s, *t;
	u32 tgid, tid, parent_id, parent_seq, on = 1;

	mm = read_word(parent + OFF_task_mm);
	s = spaces.lookup(&mm);
	if (!s)
		return 0;
	parent_id = s->id;
	parent_seq = s->seq;
	tgid = read_half(child + OFF_task_tgid);
	tid = read_half(child + OFF_task_pid);
	child_mm = read_word(child + OFF_task_mm);
	if (tgid == tid)
		traced_tgids.update(&tgid, &on);
	t = s;
	if (child_mm != mm) {
		t = new_space(child_mm);
		if (!t)
			return 0;
	}
	fill_head(cells, KIND_FORK, PLACE(t), (u64)tgid << 32 | tid);
	cells[6] = parent_id | (u64)parent_seq << 32;
	cells[7] = bpf_get_current_pid_tgid();
	cells[8] = CELL_ARGS;
	cells[9] = read_half(child_mm + OFF_mm_map_count);
	cells[10] = read_word(child_mm + OFF_mm_total_vm);
	cells[11] = read_word(child_mm + OFF_mm_data_vm);
	cells[12] = read_word(child_mm + OFF_mm_stack_vm);
	cells[13] = read_word(child_mm + OFF_mm_locked_vm);
	cells[14] = read_word(child_mm + OFF_mm_def_flags);
	cells[15] = read_word(child_mm + OFF_mm_brk);
	if (!send_small(cells) && t != s)
		t->dirty = 1;
	return 0;
}

HOOK(sched_process_exec)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u64 mm;
	struct space *s;

	if (!traced_tgids.lookup(&tgid) && !setting(SETTING_ALL))
		return 0;
	mm = current_mm();
	s = new_space(mm);
	if (!s)
		return 0;
	begin_section(s, bpf_get_current_pid_tgid());
	s->kind = KIND_EXEC;
	s->op_class = OP_EXEC;
	s->role = CELL_AFTER;
	set_range(s, 0, 0, ADDR_END);
	bpf_get_current_comm(&s->arg, 8);
	s->root_at = mm + OFF_mm_ma_root;
	start_range(s);
	walker.call(ctx, 0);
	return 0;
}

HOOK(sched_process_exit)
{
	u64 id = bpf_get_current_pid_tgid(), mm = current_mm(), cells[16] = {};
	u32 tgid = id >> 32;
	struct space *s;

	if (!traced_tgids.lookup(&tgid) && !spaces.lookup(&mm))
		return 0;
	s = spaces.lookup(&mm);
	fill_head(cells, KIND_TASK_EXIT, s ? PLACE(s) : 0, id);
	cells[6] = read_half(bpf_get_current_task() + OFF_task_exit_code);
	cells[8] = CELL_ARGS;
	/* The leader may go before the others; one of them that executes a program then takes over its PID. */
	if (!read_half(read_word(bpf_get_current_task() + OFF_task_signal) + OFF_signal_live))
		traced_tgids.delete(&tgid);
	send_small(cells);
	return 0;
}

HOOK(exit_mmap)
{
	u64 mm = ctx->args[0], cells[16] = {};
	struct space *s;

	s = spaces.lookup(&mm);
	if (!s)
		return 0;
	if (s->dead) {		/* the write lock is still held: its release comes too late for us */
		s->role = CELL_AFTER;
		s->cover_flags = 0;
		s->rows = 0;
		add_cover(s, mm, 0, 0);
		close_section(s);
	}
	fill_head(cells, KIND_SPACE_END, PLACE(s), bpf_get_current_pid_tgid());
	cells[8] = CELL_ARGS;
	spaces.delete(&mm);
	send_small(cells);
	return 0;
}
