/* SPDX-License-Identifier: MIT */
/*
 * The workload of `make demo`: a second in the life of a small server, in five scenes that every program
 * of that kind plays: an allocator that reserves and commits, threads with guard pages, a file map that
 * comes piece by piece, neighbours that refuse to become one, and a child. Prints a line a scene.
 *
 *   demo [-o DUMP]      DUMP: the final /proc/self/maps
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)
#define RW (PROT_READ | PROT_WRITE)

static size_t page;
static char scratch[65536];

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		exit(1);
}

static void must(int good, const char *what)
{
	if (good)
		return;
	perror(what);
	exit(1);
}

static void pause_a_little(void)
{
	struct timespec t = { 0, 40 * 1000 * 1000 };

	nanosleep(&t, NULL);
}

static char *map(char *at, size_t pages, int prot, int flags, int fd, size_t pgoff)
{
	char *got = mmap(at, pages * page, prot, flags, fd, pgoff * page);

	must(got != MAP_FAILED, "mmap");
	return got;
}

static void protect(char *at, size_t pages, int prot)
{
	must(!mprotect(at, pages * page, prot), "mprotect");
}

/* Reserve 256 pages without access, commit them in chunks: each commit joins the one before it. */
static char *arena(void)
{
	char *at = map(NULL, 256, PROT_NONE, ANON | MAP_NORESERVE, -1, 0);

	say("  1. an allocator reserves 1 MiB and commits it in 16 chunks\n");
	for (int i = 0; i < 16; i++) {
		protect(at + i * 8 * page, 8, RW);
		at[i * 8 * page] = 1;
		if (i % 4 == 3)
			pause_a_little();
	}
	/* A guard page inside, a trimmed tail, and a chunk given back. */
	protect(at + 60 * page, 1, PROT_NONE);
	must(!munmap(at + 200 * page, 56 * page), "munmap");
	must(!madvise(at + 96 * page, 8 * page, MADV_DONTNEED), "madvise");
	protect(at + 96 * page, 8, PROT_NONE);
	protect(at + 96 * page, 8, RW);
	return at;
}

static void *idle(void *argument)
{
	char *own = map(NULL, 4, RW, ANON, -1, 0);

	(void)argument;
	memset(own, 1, 4 * page);
	pause_a_little();
	return own;
}

static void threads(void)
{
	pthread_t handles[4];

	say("  2. four threads start: a stack and a guard page each\n");
	for (int i = 0; i < 4; i++)
		must(!pthread_create(&handles[i], NULL, idle, NULL), "pthread_create");
	for (int i = 0; i < 4; i++)
		must(!pthread_join(handles[i], NULL), "pthread_join");
}

/* A log file that grows: mapped piece by piece, each piece where the one before it ends. */
static void file_window(void)
{
	char name[] = "/tmp/vmatrace-demo.XXXXXX", *at;
	int fd = mkstemp(name);

	say("  3. a file is mapped piece by piece: the pieces become one\n");
	must(fd >= 0 && !ftruncate(fd, 16 * page), "temporary file");
	unlink(name);
	at = map(NULL, 20, PROT_NONE, ANON | MAP_NORESERVE, -1, 0) + 2 * page;
	for (int i = 0; i < 8; i++) {
		map(at + 2 * i * page, 2, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 2 * i);
		if (i % 4 == 3)
			pause_a_little();
	}
	/* The ninth at a wrong offset: it looks alike and stays apart. */
	map(at + 16 * page, 1, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 3);
	close(fd);
}

/* Two regions that look the same in maps and are not: written while apart, or told apart by a flag. */
static void strangers(void)
{
	char *at = map(NULL, 64, PROT_NONE, ANON | MAP_NORESERVE, -1, 0);

	say("  4. neighbours that look alike and refuse to become one\n");
	must(!munmap(at, 64 * page), "munmap");
	at += page;
	/* Two islands, each written: two anon_vmas. The bridge can join only one of them. */
	map(at, 4, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0)[0] = 1;
	map(at + 8 * page, 4, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0)[0] = 1;
	map(at + 4 * page, 4, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0);
	/* Core-dump hints toggled on every other page: eight VMAs where one would do... */
	map(at + 20 * page, 9, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0);
	for (int i = 1; i < 9; i += 2)
		must(!madvise(at + (20 + i) * page, page, MADV_DONTDUMP), "madvise");
	pause_a_little();
	/* ...until the hint goes again. */
	for (int i = 1; i < 5; i += 2)
		must(!madvise(at + (20 + i) * page, page, MADV_DODUMP), "madvise");
	/* Stack-like memory next to plain memory. */
	map(at + 32 * page, 4, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0);
	map(at + 36 * page, 4, RW, ANON | MAP_STACK | MAP_FIXED_NOREPLACE, -1, 0);
	/* Written, moved away: its page offset tells where it was, so it joins nobody any more. */
	at[40 * page - 1] = 1;
	map(at + 44 * page, 2, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0)[0] = 1;
	map(at + 52 * page, 2, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0);
	must(mremap(at + 44 * page, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_FIXED, at + 54 * page) != MAP_FAILED,
	     "mremap");
}

/* In a fork child, written memory is shared with the parent's: new maps no longer join it. */
static void child(char *heap)
{
	int status;
	pid_t pid;

	say("  5. a child: what merges in the parent stays apart in the child\n");
	pid = fork();
	must(pid >= 0, "fork");
	if (pid == 0) {
		sbrk(8 * page);
		protect(heap, 8, PROT_READ);
		pause_a_little();
		protect(heap, 8, RW);
		_exit(0);
	}
	must(waitpid(pid, &status, 0) == pid && status == 0, "child");
}

static void dump(const char *path)
{
	ssize_t got;
	int in = open("/proc/self/maps", O_RDONLY), out = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);

	must(in >= 0 && out >= 0, path);
	while ((got = read(in, scratch, sizeof(scratch))) > 0)
		must(write(out, scratch, got) == got, path);
}

int main(int argc, char **argv)
{
	char *heap;

	page = sysconf(_SC_PAGESIZE);
	say("demo: a small server, in five scenes\n");
	*(char *)sbrk(4 * page) = 1;
	heap = arena();
	threads();
	file_window();
	strangers();
	child(heap);
	pause_a_little();
	if (argc == 3 && !strcmp(argv[1], "-o"))
		dump(argv[2]);
	_exit(0);
}
