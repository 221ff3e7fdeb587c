// SPDX-License-Identifier: MIT OR GPL-2.0
/* Files, described once each: device, inode, hooks, how they were opened, path. */

/* A file's names are read by a program of their own: inside the walk they would cost the verifier too much. */
#define TMPFS_MAGIC	0x01021994
#define FMODE_NOACCOUNT	0x20000000	/* of the files that may be mapped: only those behind a stacked file system */
#define SEALED_WRITE	0x18	/* F_SEAL_WRITE | F_SEAL_FUTURE_WRITE */

static __always_inline u64 seals_of(u64 inode)
{
	u64 sb = read_word(inode + OFF_inode_i_sb);

	if (read_word(sb + OFF_sb_s_magic) != TMPFS_MAGIC)
		return 0;
	return read_half(inode - OFF_shmem_vfs_inode + OFF_shmem_seals) & SEALED_WRITE;
}

/*
 * What tells one use of a struct file's memory from the next: inode and its number, operations, how it was opened,
 * its seals. File and inode are recycled together (shared anonymous memory, SysV segments), so the pointers alone
 * would not do; the odd factors only spread the words.
 */
static __always_inline u64 file_state(u64 file)
{
	u64 inode = read_word(file + OFF_file_f_inode), state = inode;

	state += read_word(inode + OFF_inode_i_ino) * 0x9e3779b97f4a7c15ULL;
	state += read_word(file + OFF_file_f_op) * 0xbf58476d1ce4e5b9ULL;
	return state ^ (u64)(read_half(file + OFF_file_f_mode) & 3) << 56 ^ seals_of(inode) << 48;
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
	u64 inode = read_word(file + OFF_file_f_inode), hooks = 0, shown;
	u64 f_op, path, dentry, mnt, mount, root, parent, name, sb;
	struct file_record *out;
	int zero = 0;
	long len;
	u64 at;

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
	path = file + OFF_file_f_path;
	shown = inode;
	if (read_half(file + OFF_file_f_mode) & FMODE_NOACCOUNT) {
		hooks |= FILE_STACKED;
#ifdef OFF_backing_user_path
		path = file + OFF_backing_user_path;	/* which /proc/PID/maps shows, with its inode */
		shown = read_word(read_word(path + 8) + OFF_dentry_d_inode);
#endif
	}
	dentry = read_word(path + 8);
	mnt = read_word(path);
	mount = mnt - OFF_mount_mnt;
	root = read_word(mnt);
	sb = read_word(inode + OFF_inode_i_sb);
	if (read_half(mnt + OFF_vfsmount_mnt_flags) & 4 || read_half(sb + OFF_sb_s_iflags) & 2)
		hooks |= FILE_NOEXEC;
	out->head[2] = bpf_ktime_get_ns();
	out->head[3] = file;
	out->head[4] = read_word(shown + OFF_inode_i_ino);
	out->head[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
	out->head[6] = read_half(read_word(shown + OFF_inode_i_sb) + OFF_sb_s_dev) | (u64)read_half(inode + OFF_inode_i_mode) << 32;
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
		at = hidden(out->used);
		if (at > FILE_PATH - 256)
			break;
		len = bpf_probe_read_kernel_str(&out->path[at], 256, (void *)name);
		if (len <= 0 || len > 256)
			break;
		out->used = at + len;
		if (parent == dentry)
			break;
		dentry = parent;
	}
	out->head[1] = KIND_FILE | hooks << 8 | out->used << 32;
	if (ring.ringbuf_output(&out->head[1], FILE_BYTES, NO_WAKEUP)) {
		bump(COUNT_LOST);
		files_seen.delete(&file);	/* to be told again when it is next met */
	}
}
