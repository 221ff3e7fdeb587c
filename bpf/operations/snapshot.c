// SPDX-License-Identifier: MIT OR GPL-2.0
/* Snapshots of running processes: one run per VMA, the mmap lock held for reading. */

struct vma_words {
	u64 word[VMA_READ_SIZE / 8 + 1];
};

BPF_PERCPU_ARRAY(iterated_vma, struct vma_words, 1);	/* not on the stack, which `out` nearly fills */

struct bpf_iter__task_vma {
	u64 meta, task, vma;
};

int bpf_iter__task_vma(struct bpf_iter__task_vma *ctx)
{
	u64 meta = ctx->meta, task = ctx->task, vma = ctx->vma, seq, mm, file;
	u64 out[24] = {}, *v;
	struct vma_words *words;
	u32 tgid, tid;
	struct space *s;
	int zero = 0;

	words = iterated_vma.lookup(&zero);
	if (!task || !vma || !words)
		return 0;
	v = words->word;
	tgid = read_half(task + OFF_task_tgid);
	tid = read_half(task + OFF_task_pid);
	if (!traced_tgids.lookup(&tgid) && !setting(SETTING_ALL))
		return 0;
	mm = read_word(task + OFF_task_mm);
	out[0] = (u64)tgid << 32 | tid;
	out[1] = mm;
	s = spaces.lookup(&mm);
	if (s) {
		out[2] = s->id | (u64)s->seq << 32;
		out[3] = s->open_tid;
	}
	bpf_probe_read_kernel(v, VMA_READ_SIZE, (void *)vma);
	if (!v[OFF_vma_vm_ops / 8])
		out[4] |= ROW_ANONYMOUS;
	else if (read_word(v[OFF_vma_vm_ops / 8] + OFF_vm_ops_close))
		out[4] |= ROW_CLOSE;
	if (v[OFF_vma_anon_vma_chain / 8] != v[OFF_vma_anon_vma_chain / 8 + 1])
		out[4] |= ROW_FORKED;
	out[5] = v[OFF_vma_vm_start / 8];
	out[6] = v[OFF_vma_vm_end / 8];
	out[7] = v[OFF_vma_vm_flags / 8];
	out[8] = v[OFF_vma_vm_pgoff / 8];
	out[9] = vma;
	out[10] = v[OFF_vma_anon_vma / 8];
	file = out[11] = v[OFF_vma_vm_file / 8];
#ifdef OFF_vma_vm_userfaultfd_ctx
	out[12] = v[OFF_vma_vm_userfaultfd_ctx / 8];
#endif
#ifdef OFF_vma_vm_policy
	if (v[OFF_vma_vm_policy / 8])
		out[13] = policy_content(v[OFF_vma_vm_policy / 8]);
#endif
	out[14] = read_half(mm + OFF_mm_map_count);
	out[15] = read_word(mm + OFF_mm_total_vm);
	out[16] = read_word(mm + OFF_mm_data_vm);
	out[17] = read_word(mm + OFF_mm_stack_vm);
	out[18] = read_word(mm + OFF_mm_locked_vm);
	out[19] = read_word(mm + OFF_mm_brk);
	out[20] = read_word(mm + OFF_mm_def_flags);
	out[21] = read_word(mm + OFF_mm_flags);
	out[22] = read_word(mm + OFF_mm_start_brk);
	out[23] = bpf_ktime_get_ns();
	if (file && !seen_before(file))
		describe_file(file);
	/* The verifier wants the pointer that a plain load gives; bcc would make it a read through a helper. */
	asm volatile("%0 = *(u64 *)(%1 + 0)" : "=r"(seq) : "r"(meta));
	bpf_seq_write((void *)seq, out, sizeof(out));
	return 0;
}
