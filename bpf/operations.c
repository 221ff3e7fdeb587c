// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The operations layer: what every VMA-shaping call did to an address space, seen from tracepoints alone.
 *
 * The VMAs around a range are read by walking the maple tree inside the kernel's own mmap write lock, so no
 * other thread can be in the way. All of one write section is gathered in its address space's `space` and leaves
 * as one ring-buffer record made of 64-byte cells; schema.py documents the cells.
 *
 * Constants come from vmatrace_kernel.h (offsets from BTF, text ranges from kallsyms) and vmatrace_events.h
 * (generated from schema.py). Nothing here knows a kernel version.
 */
#include "vmatrace_kernel.h"
#include "vmatrace_events.h"
#include "vma_compat.h"

#define CELL_MAX	56	/* cells gathered before a partial record leaves */
#define WALK_STEPS	24	/* slots or levels per program run; the walker calls itself again for more */
#define NODE_MASK	(~0xffULL)
#define ADDR_END	(~0ULL)
#define NO_WAKEUP	1
#define NEW_FILES	4

/* total_vm to brk lie close together in every mm_struct: one read, then words of it */
#define MM_WORD(field)	((OFF_mm_##field - OFF_mm_total_vm) / 8)
#define MM_READ_SIZE	(OFF_mm_brk - OFF_mm_total_vm + 8)

/* One program per raw tracepoint; bcc must not attach them by itself, so not its RAW_TRACEPOINT_PROBE. */
#define HOOK(tracepoint) int on_##tracepoint(struct bpf_raw_tracepoint_args *ctx)

struct space {
	u32 id, seq;
	u32 open_tid;		/* the task inside the write section; 0: none */
	u8 downgraded, finished, dirty, dead;
	u8 op_class, abi, role, cover_flags;
	u16 nr, n;		/* n: cells used */
	u32 evidence;		/* events in this section; odd: the last cell has room for one more */
	u64 range[6];		/* three of [from, to); bcc takes one-dimensional arrays only */
	u32 ranges, current_range;
	u32 rows, kind;
	u64 store_lo, store_hi;
	u64 acquired, arg;
	u64 walk_node, walk_min, walk_max, walk_addr, cover_lo;
	u32 slot, in_leaf;
	u64 root_at;
	u32 new_files, done;
	u64 new_file[NEW_FILES];
	u64 mm_words[MM_READ_SIZE / 8];
	u64 node[32];
	u64 vma[32];
	u64 cells[65 * 8];
};

BPF_RINGBUF_OUTPUT(ring, RING_PAGES);
BPF_TABLE("hash", u64, struct space, spaces, MAX_SPACES);
BPF_ARRAY(blank_space, struct space, 1);
BPF_HASH(traced_tgids, u32, u32, 65536);
BPF_ARRAY(op_classes, u16, 1024);
BPF_ARRAY(settings, u64, 8);
BPF_PERCPU_ARRAY(counts, u64, COUNT_MAX);
BPF_ARRAY(next_space, u64, 1);
BPF_ARRAY(store_fn, u64, 1);
BPF_TABLE("lru_hash", u64, u64, files_seen, 16384);
BPF_PERCPU_ARRAY(file_buf, struct file_record, 1);
BPF_PROG_ARRAY(walker, 2);

static __always_inline u64 bump(int which)
{
	u64 *count = counts.lookup(&which);

	return count ? ++*count : 0;
}

static __always_inline u64 setting(int which)
{
	u64 *value = settings.lookup(&which);

	return value ? *value : 0;
}

static __always_inline u64 read_word(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, 8, (void *)address);
	return value;
}

static __always_inline u32 read_half(u64 address)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, 4, (void *)address);
	return value;
}

static __always_inline u64 current_mm(void)
{
	return read_word(bpf_get_current_task() + OFF_task_mm);
}

/* ---- records ------------------------------------------------------------------------------------------- */

static __always_inline void fill_head(u64 *head, u32 kind, u32 flags, struct space *s)
{
	u64 id = bpf_get_current_pid_tgid();

	head[1] = kind | flags << 8 | (u64)s->op_class << 16 | (u64)s->abi << 24 | (u64)s->nr << 32;
	head[2] = bpf_ktime_get_ns();
	head[3] = s->id | (u64)s->seq << 32;
	head[4] = id;
	head[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
}

/* Sends the gathered cells. A failed reserve marks the space dirty: its next section reads the whole tree. */
static __always_inline void send(struct space *s, u32 flags)
{
	u64 *head = &s->cells[0], size = s->n * 64ULL - 8;

	asm volatile("" : "+r"(size));
	size &= 4095;
	fill_head(head, s->kind, flags, s);
	head[6] = s->mm_words[MM_WORD(brk)];
	head[7] = s->arg;
	if (ring.ringbuf_output(&s->cells[1], size, NO_WAKEUP)) {
		bump(COUNT_LOST);
		s->dirty = 1;
	}
	s->n = 1;
	s->evidence &= ~1U;
}

/* Called where cells are added again and again; leaves room for the few that one step adds. */
static __always_inline void make_room(struct space *s)
{
	if (s->n >= CELL_MAX)
		send(s, SECTION_PARTIAL);
}

static __always_inline u64 *next_cell(struct space *s, u64 tag)
{
	u64 *cell = &s->cells[(s->n & 63) * 8];

	cell[0] = tag;
	s->n++;
	return cell;
}

/* A CALL, TASK or other small record that belongs to no write section: head cell and one more. */
static __always_inline void send_small(u64 *cells)
{
	if (ring.ringbuf_output(cells + 1, 120, NO_WAKEUP))
		bump(COUNT_LOST);
}

/* ---- files --------------------------------------------------------------------------------------------- */

/* A file's names are read by a program of their own: inside the walk they would cost the verifier too much. */
#define TMPFS_MAGIC	0x01021994
#define SEALED_WRITE	0x18	/* F_SEAL_WRITE | F_SEAL_FUTURE_WRITE */

static __always_inline u64 seals_of(u64 inode)
{
	u64 sb = read_word(inode + OFF_inode_i_sb);

	if (read_word(sb + OFF_sb_s_magic) != TMPFS_MAGIC)
		return 0;
	return read_half(inode - OFF_shmem_vfs_inode + OFF_shmem_seals) & SEALED_WRITE;
}

/* What tells one use of a struct file's memory from the next: its inode, how it was opened, its seals. */
static __always_inline u64 file_state(u64 file)
{
	u64 inode = read_word(file + OFF_file_f_inode);

	return inode ^ (u64)(read_half(file + OFF_file_f_mode) & 3) << 56 ^ seals_of(inode) << 48;
}

static __always_inline int seen_before(u64 file)
{
	u64 state = file_state(file), *seen;

	seen = files_seen.lookup(&file);
	if (seen && *seen == state)
		return 1;
	files_seen.update(&file, &state);
	return 0;
}

static __always_inline void note_file(struct space *s, u64 file)
{
	u32 at = s->new_files;

	if (at >= NEW_FILES || seen_before(file))
		return;
	s->new_file[at & (NEW_FILES - 1)] = file;
	s->new_files = at + 1;
}

/* What d_path() asks: 1 unhashed (deleted), 2 a dentry of its own (memfd, anon_inode), which names itself. */
static __always_inline u64 name_bits(u64 dentry, u64 root)
{
	u64 bits = read_word(dentry + OFF_dentry_d_hash + 8) == 0;

	if (read_word(dentry + OFF_dentry_d_parent) == dentry)
		bits = dentry == root ? 0 : 2;
	return bits;
}

/* Device, inode, hooks and path, the path's names from leaf to root. */
static __always_inline void describe_file(u64 file)
{
	u64 inode = read_word(file + OFF_file_f_inode), hooks = 0;
	u64 f_op, dentry, mnt, mount, root, parent, name, sb;
	struct file_record *out;
	int zero = 0;
	long len;
	u32 at;

	out = file_buf.lookup(&zero);
	if (!out)
		return;
	f_op = read_word(file + OFF_file_f_op);
	if (f_op && read_word(f_op + OFF_fops_mmap))
		hooks |= FILE_MMAP;
#ifdef OFF_fops_mmap_prepare
	if (f_op && read_word(f_op + OFF_fops_mmap_prepare))
		hooks |= FILE_MMAP_PREPARE;
#endif
	hooks |= (read_half(file + OFF_file_f_mode) & 3) << 2;
	if (f_op && read_word(f_op + OFF_fops_get_unmapped_area))
		hooks |= FILE_OWN_AREA;
	if (seals_of(inode))
		hooks |= FILE_SEALED;
	dentry = read_word(file + OFF_file_f_path + 8);
	mnt = read_word(file + OFF_file_f_path);
	mount = mnt - OFF_mount_mnt;
	root = read_word(mnt);
	sb = read_word(inode + OFF_inode_i_sb);
	if (read_half(mnt + OFF_vfsmount_mnt_flags) & 4 || read_half(sb + OFF_sb_s_iflags) & 2)
		hooks |= FILE_NOEXEC;
	out->head[2] = bpf_ktime_get_ns();
	out->head[3] = file;
	out->head[4] = read_word(inode + OFF_inode_i_ino);
	out->head[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
	out->head[6] = read_half(sb + OFF_sb_s_dev) | (u64)read_half(inode + OFF_inode_i_mode) << 32;
	out->head[7] = read_half(sb + OFF_sb_s_magic);
	out->tag = CELL_ARGS | name_bits(dentry, root) << 8;
	out->used = 0;	/* kept in memory, where the verifier forgets its value: one state per turn, not many */
#pragma clang loop unroll(disable)
	for (int i = 0; i < 40; i++) {
		if (dentry == root) {
			parent = read_word(mount + OFF_mount_mnt_parent);
			if (parent == mount || !parent)
				break;
			dentry = read_word(mount + OFF_mount_mnt_mountpoint);
			mount = parent;
			root = read_word(mount + OFF_mount_mnt);
			continue;
		}
		parent = read_word(dentry + OFF_dentry_d_parent);
		name = read_word(dentry + OFF_dentry_d_name + 8);
		at = out->used;
		if (at > FILE_PATH - 256)
			break;
		len = bpf_probe_read_kernel_str(&out->path[at & (FILE_PATH - 1)], 256, (void *)name);
		if (len <= 0 || len > 256)
			break;
		out->used = at + len;
		if (parent == dentry)
			break;
		dentry = parent;
	}
	out->head[1] = KIND_FILE | hooks << 8 | out->used << 32;
	if (ring.ringbuf_output(&out->head[1], FILE_BYTES, NO_WAKEUP))
		bump(COUNT_LOST);
}

/* ---- the walk ------------------------------------------------------------------------------------------ */

static __always_inline u64 policy_content(u64 policy)
{
	u64 mode = read_half(policy + OFF_mempolicy_mode);	/* mode and flags, 16 bits each */
	u64 nodes = read_word(policy + OFF_mempolicy_nodes);
	u64 home = 0, user;

#ifdef OFF_mempolicy_home_node
	home = read_half(policy + OFF_mempolicy_home_node) & 0xff;
#endif
	user = read_word(policy + OFF_mempolicy_w);
	return (mode & 0xf) + 1 | (mode >> 16 & 0xffff) << 4 | home << 20 | (nodes & 0xffff) << 28 |
	       (user & 0xffff) << 44;
}

static __always_inline void add_row(struct space *s, u64 vma)
{
	u64 *v = s->vma, bits = 0, ops, policy = 0, uffd = 0, name = 0, *cell;

	if (bpf_probe_read_kernel(v, VMA_READ_SIZE, (void *)vma))
		s->cover_flags |= COVER_UNREADABLE;
	ops = v[OFF_vma_vm_ops / 8];
	if (!ops)
		bits |= ROW_ANONYMOUS;
	else if (read_word(ops + OFF_vm_ops_close))
		bits |= ROW_CLOSE;
	if (v[OFF_vma_anon_vma_chain / 8] != v[OFF_vma_anon_vma_chain / 8 + 1])
		bits |= ROW_FORKED;
	if (v[OFF_vma_vm_file / 8])
		note_file(s, v[OFF_vma_vm_file / 8]);
#ifdef OFF_vma_vm_policy
	policy = v[OFF_vma_vm_policy / 8];
#endif
#ifdef OFF_vma_vm_userfaultfd_ctx
	uffd = v[OFF_vma_vm_userfaultfd_ctx / 8];
#endif
#ifdef OFF_vma_anon_name
	name = v[OFF_vma_anon_name / 8];
#endif
	if (policy || uffd || name)
		bits |= ROW_EXTRA;
	cell = next_cell(s, s->role | bits << 32);
	cell[1] = v[OFF_vma_vm_start / 8];
	cell[2] = v[OFF_vma_vm_end / 8];
	cell[3] = v[OFF_vma_vm_flags / 8];
	cell[4] = v[OFF_vma_vm_pgoff / 8];
	cell[5] = vma;
	cell[6] = v[OFF_vma_anon_vma / 8];
	cell[7] = v[OFF_vma_vm_file / 8];
	s->rows++;
	if (bits & ROW_EXTRA) {
		cell = next_cell(s, CELL_EXTRA | (u64)s->role << 8);
		cell[1] = uffd;
		cell[2] = policy ? policy_content(policy) : 0;
		cell[3] = 0;
		cell[4] = 0;
		cell[5] = 0;
		cell[6] = 0;
		cell[7] = 0;
#ifdef OFF_vma_anon_name
		if (name)
			bpf_probe_read_kernel_str(&cell[3], 40, (void *)(name + OFF_anon_name_name));
#endif
	}
}

/* Closes one walked range: the interval it is complete for, with the mm's own fields of that moment. */
static __always_inline void add_cover(struct space *s, u64 mm, u64 lo, u64 hi)
{
	u64 *cell = next_cell(s, CELL_COVER | (u64)s->role << 8 | (u64)s->cover_flags << 16 | (u64)s->rows << 32);

	cell[1] = lo;
	cell[2] = hi;
	if (s->role == CELL_BEFORE) {
		cell[3] = s->acquired;
		bpf_probe_read_kernel(s->mm_words, MM_READ_SIZE, (void *)(mm + OFF_mm_total_vm));
		cell[4] = s->mm_words[MM_WORD(def_flags)];
		cell[5] = read_word(mm + OFF_mm_flags);
		cell[6] = s->mm_words[MM_WORD(brk)];
		cell[7] = s->mm_words[MM_WORD(start_brk)];
	} else {
		bpf_probe_read_kernel(s->mm_words, MM_READ_SIZE, (void *)(mm + OFF_mm_total_vm));
		cell[3] = read_half(mm + OFF_mm_map_count);
		cell[4] = s->mm_words[MM_WORD(total_vm)];
		cell[5] = s->mm_words[MM_WORD(data_vm)];
		cell[6] = s->mm_words[MM_WORD(stack_vm)];
		cell[7] = s->mm_words[MM_WORD(locked_vm)];
	}
	s->rows = 0;
}

static __always_inline void close_section(struct space *s)
{
	send(s, s->finished ? 0 : SECTION_PARTIAL);
	s->open_tid = 0;
	s->kind = KIND_SECTION;
}

static __always_inline void start_range(struct space *s)
{
	u32 at = s->current_range;

	if (at > 2)
		at = 2;
	s->walk_addr = s->range[2 * at] ? s->range[2 * at] - 1 : 0;
	s->cover_lo = ADDR_END;
	s->in_leaf = 0;
	s->walk_node = 0;
	s->done = 0;
}

#define COUNT_PIVOT(j)							\
	t = ((v[j + 1] - 1) >> 12) - (addr >> 12);			\
	asm volatile("" : "+r"(t));					\
	i += (t >> 63) & (j < 9 || wide);

/* One level down or one slot on. Returns 1 when all ranges are done. */
static __always_inline int step(struct space *s, u64 mm)
{
	u64 *v = s->node, addr = s->walk_addr, t, lo, hi, entry, end;
	u64 wide, i = 0;
	u32 at = s->current_range, base;

	if (at > 2)
		return 1;
	make_room(s);
	if (!s->in_leaf) {
		u64 node = s->walk_node;

		if (!node) {
			node = read_word(s->root_at);
			if ((node & 3) != 2) {
				s->cover_flags |= COVER_NO_TREE;
				return 1;
			}
			s->walk_min = 0;
			s->walk_max = ADDR_END;
		}
		if (bpf_probe_read_kernel(v, 256, (void *)(node & NODE_MASK)))
			s->cover_flags |= COVER_UNREADABLE;
		if ((v[0] & NODE_MASK) == (node & NODE_MASK))
			s->cover_flags |= COVER_DEAD_NODE;
		u32 type = node >> 3 & 15;

		wide = type != MAPLE_ARANGE;
		COUNT_PIVOT(0) COUNT_PIVOT(1) COUNT_PIVOT(2) COUNT_PIVOT(3) COUNT_PIVOT(4)
		COUNT_PIVOT(5) COUNT_PIVOT(6) COUNT_PIVOT(7) COUNT_PIVOT(8) COUNT_PIVOT(9)
		COUNT_PIVOT(10) COUNT_PIVOT(11) COUNT_PIVOT(12) COUNT_PIVOT(13) COUNT_PIVOT(14)
		base = wide ? OFF_range64_slot / 8 : OFF_arange64_slot / 8;
		entry = v[(base + i) & 31];
		end = v[(i + 1) & 31];
		hi = (i + 1 < base && end) ? end : s->walk_max;
		lo = i ? v[i & 31] + 1 : s->walk_min;
		if (type != MAPLE_LEAF) {
			s->walk_min = lo;
			s->walk_max = hi;
			s->walk_node = entry;
			if (!(entry & NODE_MASK)) {
				s->cover_flags |= COVER_UNREADABLE;
				return 1;
			}
			return 0;
		}
		s->in_leaf = 1;
		s->slot = i;
	}
	i = s->slot & 15;
	entry = v[(OFF_range64_slot / 8 + i) & 31];
	end = v[(i + 1) & 31];
	hi = (i < 15 && end) ? end : s->walk_max;
	lo = i ? v[i & 31] + 1 : s->walk_min;
	if (s->cover_lo == ADDR_END)
		s->cover_lo = lo;
	if (entry)
		add_row(s, entry);
	s->walk_addr = hi + 1;
	if (hi >= s->range[2 * at + 1]) {
		add_cover(s, mm, s->cover_lo, hi == ADDR_END ? ADDR_END : hi + 1);
		s->current_range = at + 1;
		if (at + 1 >= s->ranges)
			return 1;
		start_range(s);
		return 0;
	}
	if (hi >= s->walk_max || i >= 15) {
		s->in_leaf = 0;
		s->walk_node = 0;
	} else {
		s->slot = i + 1;
	}
	return 0;
}

static __always_inline struct space *walked_space(struct bpf_raw_tracepoint_args *ctx, u64 *mm)
{
	struct space *s;

	*mm = ctx->args[0];
	s = spaces.lookup(mm);
	if (s)
		return s;
	*mm = current_mm();
	return spaces.lookup(mm);
}

/* The tail-called walker. The raw tracepoint's first argument is the mm at the lock hooks; elsewhere current's. */
int walk(struct bpf_raw_tracepoint_args *ctx)
{
	struct space *s;
	u64 mm;

	s = walked_space(ctx, &mm);
	if (!s)
		return 0;
#pragma clang loop unroll(disable)
	for (int n = 0; n < WALK_STEPS; n++) {
		if (s->done || s->new_files >= NEW_FILES)
			break;
		s->done = step(s, mm);
	}
	if (s->new_files)
		walker.call(ctx, 1);
	if (!s->done) {
		walker.call(ctx, 0);
		s->cover_flags |= COVER_CUT;	/* out of tail calls */
		add_cover(s, mm, s->cover_lo, s->walk_addr);
	}
	if (s->role == CELL_AFTER)
		close_section(s);
	return 0;
}

/* One noted file a run, then itself again or back to the walk. */
int describe_files(struct bpf_raw_tracepoint_args *ctx)
{
	struct space *s;
	u64 mm;
	u32 at;

	s = walked_space(ctx, &mm);
	if (!s)
		return 0;
	at = s->new_files - 1;
	s->new_files = at;
	describe_file(s->new_file[at & (NEW_FILES - 1)]);
	walker.call(ctx, at ? 1 : 0);
	return 0;
}

static __always_inline void set_range(struct space *s, u32 at, u64 lo, u64 hi)
{
	if (at > 2)
		return;
	s->range[2 * at] = lo;
	s->range[2 * at + 1] = hi;
	s->ranges = at + 1;
}

/* [address, address + length), the end rounded up to pages; an impossible range is left out. */
static __always_inline void add_user_range(struct space *s, u64 address, u64 length)
{
	u64 lo = address & ~(PAGE_BYTES - 1);
	u64 hi = (address + length + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);

	if (length < 1ULL << 60 && hi > lo && lo < 1ULL << 60 && s->ranges < 3)
		set_range(s, s->ranges, lo, hi);
}

/* ---- system calls -------------------------------------------------------------------------------------- */

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
		bpf_probe_read_user(pair, 16, (void *)args[2]);
		add_user_range(s, pair[0], pair[1]);
		break;
	case OP_WHOLE:
	case OP_OTHER:
		set_range(s, 0, 0, ADDR_END);
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

HOOK(sys_exit)
{
	u64 regs = ctx->args[0], args[6] = {}, nr, mm, cells[16], id, limit;
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
	if (class == OP_LIMITS) {	/* the new limit, soft and hard, goes where no argument is */
		args[4] = args[5] = ADDR_END;
		limit = args[2] ? args[2] : args[1];
		if (limit > 4096)
			bpf_probe_read_user(&args[4], 16, (void *)limit);
	}
	id = bpf_get_current_pid_tgid();
	cells[0] = 0;
	cells[1] = KIND_CALL | (u64)class << 16 | (u64)abi << 24 | nr << 32;
	cells[2] = bpf_ktime_get_ns();
	cells[3] = s->id | (u64)s->seq << 32;
	cells[4] = id;
	cells[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
	cells[6] = ctx->args[1];
	cells[7] = 0;
	cells[8] = CELL_ARGS;
	cells[9] = args[0];
	cells[10] = args[1];
	cells[11] = args[2];
	cells[12] = args[3];
	cells[13] = args[4];
	cells[14] = args[5];
	cells[15] = 0;
	send_small(cells);
	return 0;
}

/* ---- second evidence: stores, births and deaths of VMA objects ------------------------------------------ */

static __always_inline void add_evidence(struct space *s, u64 what, u64 object, u64 lo, u64 hi)
{
	u64 *cell;

	if (s->evidence & 1) {
		cell = &s->cells[((s->n - 1) & 63) * 8];
		cell[0] |= what << 16;
		cell[4] = object;
		cell[5] = lo;
		cell[6] = hi;
	} else {
		make_room(s);
		cell = next_cell(s, CELL_EVIDENCE | what << 8);
		cell[1] = object;
		cell[2] = lo;
		cell[3] = hi;
		cell[4] = 0;
		cell[5] = 0;
		cell[6] = 0;
		cell[7] = 0;
	}
	s->evidence++;
}

static __always_inline struct space *open_space(u64 mm)
{
	struct space *s = spaces.lookup(&mm);

	if (!s || s->dead || s->open_tid != (u32)bpf_get_current_pid_tgid())
		return 0;
	return s;
}

HOOK(ma_write)
{
	u64 mas[3], fn, *known, text[2] = {}, mm;
	struct space *s;
	int zero = 0;

	if (!ctx->args[3])
		return 0;
	fn = ctx->args[0];
	known = store_fn.lookup(&zero);
	if (!known)
		return 0;
	if (*known != fn) {
		if (*known)
			return 0;
		bpf_probe_read_kernel(text, 16, (void *)fn);
		/* "mas_store_prealloc": all other names repeat it or belong to other trees */
		if (text[0] != 0x726f74735f73616dULL || (text[1] & 0xffffff) != 0x705f65)
			return 0;
		*known = fn;
	}
	bpf_probe_read_kernel(mas, 24, (void *)ctx->args[1]);
	mm = mas[0] - OFF_mm_mm_mt;
	s = open_space(mm);
	if (!s || s->op_class == OP_FORK)
		return 0;
	add_evidence(s, EVIDENCE_STORE, ctx->args[3], mas[1], mas[2] + 1);
	/* A walk of a range reads whole slots, its neighbours' too: only a store that touches none needs more. */
#pragma unroll
	for (u32 r = 0; r < 3; r++)
		if (r < s->ranges && mas[1] <= s->range[2 * r + 1] && mas[2] + 1 >= s->range[2 * r])
			return 0;
	if (mas[1] < s->store_lo)
		s->store_lo = mas[1];
	if (mas[2] + 1 > s->store_hi)
		s->store_hi = mas[2] + 1;
	return 0;
}

static __always_inline void anon_vma_gained(u64 cache)
{
	u64 mm = current_mm(), name[2] = {}, cells[16] = {}, id = bpf_get_current_pid_tgid();
	struct space *s = spaces.lookup(&mm);

	if (!s)
		return;
	bpf_probe_read_kernel_str(name, 16, (void *)read_word(cache + OFF_kmem_cache_name));
	if ((u8)name[1] == 0)
		return;		/* "anon_vma" itself; one "anon_vma_chain" is allocated per gain */
	cells[1] = KIND_ANON_VMA;
	cells[2] = bpf_ktime_get_ns();
	cells[3] = s->id | (u64)s->seq << 32;
	cells[4] = id;
	cells[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
	cells[6] = s->open_tid == (u32)id;
	cells[8] = CELL_ARGS;
	send_small(cells);
}

HOOK(kmem_cache_alloc)
{
	u64 site = ctx->args[0];
	struct space *s;
	u64 what;

	if (site - TEXT_vm_area_alloc < SIZE_vm_area_alloc)
		what = EVIDENCE_ALLOC;
	else if (site - TEXT_vm_area_dup < SIZE_vm_area_dup)
		what = EVIDENCE_DUP;
	else if (site - TEXT___anon_vma_prepare < SIZE___anon_vma_prepare) {
		anon_vma_gained(ctx->args[2]);
		return 0;
	} else
		return 0;
	s = open_space(current_mm());
	if (s && s->op_class != OP_FORK)
		add_evidence(s, what, ctx->args[1], 0, 0);
	return 0;
}

HOOK(kmem_cache_free)
{
	u64 site = ctx->args[0];
	struct space *s;
	u64 what;

	if (site - TEXT_vma_lo >= TEXT_vma_span)
		return 0;
	if (site - TEXT_vma_complete < SIZE_vma_complete)
		what = EVIDENCE_MERGED;
	else if (site - TEXT_vms_complete_munmap_vmas < SIZE_vms_complete_munmap_vmas ||
		 site - TEXT_remove_vma < SIZE_remove_vma)
		what = EVIDENCE_UNMAPPED;
	else if (site - TEXT_vm_area_free < SIZE_vm_area_free)
		what = EVIDENCE_FREED;
	else
		return 0;
	s = open_space(current_mm());
	if (s && s->op_class != OP_FORK)
		add_evidence(s, what, ctx->args[1], 0, 0);
	return 0;
}

/* ---- lives of address spaces and tasks ------------------------------------------------------------------ */

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
	cells[1] = KIND_FORK;
	cells[2] = bpf_ktime_get_ns();
	cells[3] = t->id | (u64)t->seq << 32;
	cells[4] = (u64)tgid << 32 | tid;
	cells[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
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
	send_small(cells);
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
	cells[1] = KIND_TASK_EXIT;
	cells[2] = bpf_ktime_get_ns();
	cells[3] = s ? s->id | (u64)s->seq << 32 : 0;
	cells[4] = id;
	cells[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
	cells[6] = read_half(bpf_get_current_task() + OFF_task_exit_code);
	cells[8] = CELL_ARGS;
	if (tgid == (u32)id)
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
	cells[1] = KIND_SPACE_END;
	cells[2] = bpf_ktime_get_ns();
	cells[3] = s->id | (u64)s->seq << 32;
	cells[4] = bpf_get_current_pid_tgid();
	cells[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
	cells[8] = CELL_ARGS;
	spaces.delete(&mm);
	send_small(cells);
	return 0;
}

/* ---- snapshots: one run per VMA of each traced process, the mmap lock held for reading ------------------- */

struct bpf_iter__task_vma {
	u64 meta, task, vma;
};

int bpf_iter__task_vma(struct bpf_iter__task_vma *ctx)
{
	u64 meta = ctx->meta, task = ctx->task, vma = ctx->vma, seq, mm, file;
	u64 out[24] = {}, v[VMA_READ_SIZE / 8];
	u32 tgid, tid;
	struct space *s;

	if (!task || !vma)
		return 0;
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
