/* SPDX-License-Identifier: MIT */
/*
 * What every counted workload shares: options, a tally of expected effects, the exact dump of maps.
 *
 *   PROGRAM [--expect] [--baseline] [--check] [-o DUMP] [-x STATUS]
 *
 * --expect    after the run, print what vmatrace must have counted, as one JSON object on stdout.
 * --baseline  leave out the counted part: what is left is the loader's doing, to be subtracted.
 * --check     after each counted step compare the number of VMAs with the tally (slow).
 * -o DUMP     at the very end copy /proc/self/maps to DUMP; no VMA changes after that.
 * -x STATUS   exit with STATUS.
 *
 * Nothing here allocates: no malloc, no stdio. A tally counts effects in vmatrace's own words:
 * merge (both sides at once = 1), victims (objects that a merge removed), split (one cut), unmap
 * (objects removed otherwise, not at exit), new, copy (mremap and fork), grow (brk and mremap in
 * place; those that merged are in merge as well), stack (stack growths by fault). images = programs
 * executed: the loader's own effects, which --baseline shows, occur once in each.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ANON (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
#define RO PROT_READ
#define RW (PROT_READ | PROT_WRITE)
#define NONE PROT_NONE

/* One name per counter; the JSON keys are these names ("fresh" prints as "new"). */
struct tally {
	long merge, victims, split, unmap, fresh, copy, grow, stack;
	long mmap, munmap, mprotect, mremap, brk, madvise, mlock, mlock2, munlock;
	long fork, exec, failed;
	/* VMAs that fork copied: not in this address space, so not in its count of VMAs. */
	long forked;
};

static struct tally want;
static struct {
	const char *name;
	const char *dump;
	int expect, baseline, check, status;
	long vmas;
	size_t page;
	int argc;
	char **argv;
} wl;

static inline void wl_say(const char *text)
{
	if (write(2, text, strlen(text)) < 0)
		_exit(99);
}

static inline void wl_die(const char *what)
{
	char text[200];

	snprintf(text, sizeof(text), "%s: %s: %s\n", wl.name, what, strerror(errno));
	wl_say(text);
	_exit(99);
}

/* VMAs of this process: the lines of its maps, without the gate page that is no VMA. */
static inline long wl_vmas(void)
{
	static char text[65536];
	long lines = 0;
	ssize_t got;
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		wl_die("/proc/self/maps");
	while ((got = read(fd, text, sizeof(text) - 1)) > 0) {
		text[got] = 0;
		for (ssize_t i = 0; i < got; i++)
			lines += text[i] == '\n';
		/* The kernel hands out whole lines, so the name is never cut in two. */
		if (strstr(text, "[vsyscall]"))
			lines--;
	}
	close(fd);
	return lines;
}

/* Compares the tally with the kernel's own number of VMAs; a difference ends the program. */
static inline void wl_check(const char *where)
{
	long now, due;
	char text[200];

	if (!wl.check)
		return;
	now = wl_vmas();
	due = wl.vmas + want.fresh + want.copy - want.forked + want.split - want.unmap - want.victims;
	if (now == due)
		return;
	snprintf(text, sizeof(text), "%s: %s: %ld VMAs, the tally says %ld\n", wl.name, where, now, due);
	wl_say(text);
	_exit(98);
}

static inline void wl_dump(const char *path)
{
	static char text[65536];
	ssize_t got;
	int in, out;

	out = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	in = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	if (out < 0 || in < 0)
		wl_die(path);
	while ((got = read(in, text, sizeof(text))) > 0)
		if (write(out, text, got) != got)
			wl_die(path);
	close(in);
	close(out);
}

static inline void wl_print(void)
{
	static char text[2048];
	int n;

	n = snprintf(text, sizeof(text),
		     "{\"workload\": \"%s\", \"effects\": {\"merge\": %ld, \"victims\": %ld, \"split\": %ld, "
		     "\"unmap\": %ld, \"new\": %ld, \"copy\": %ld, \"grow\": %ld, \"stack\": %ld}, "
		     "\"calls\": {\"mmap\": %ld, \"munmap\": %ld, \"mprotect\": %ld, \"mremap\": %ld, "
		     "\"brk\": %ld, \"madvise\": %ld, \"mlock\": %ld, \"mlock2\": %ld, \"munlock\": %ld, "
		     "\"fork\": %ld, \"exec\": %ld}, \"failed_calls\": %ld, \"images\": %ld}\n",
		     wl.name, want.merge, want.victims, want.split, want.unmap, want.fresh, want.copy,
		     want.grow, want.stack, want.mmap, want.munmap, want.mprotect, want.mremap, want.brk,
		     want.madvise, want.mlock, want.mlock2, want.munlock, want.fork, want.exec,
		     want.failed, want.exec + 1);
	if (write(1, text, n) != n)
		_exit(99);
}

/* The last thing a workload does: dump, print, leave without running any exit handler. */
static inline void wl_finish(void)
{
	if (!wl.baseline)
		wl_check("end");
	if (wl.expect)
		wl_print();
	if (wl.dump)
		wl_dump(wl.dump);
	_exit(wl.status);
}

/* Parses the options; with --baseline the program ends here. What is no option stays in wl.argv. */
static inline void wl_start(int argc, char **argv, const char *name)
{
	wl.name = name;
	wl.page = sysconf(_SC_PAGESIZE);
	wl.argv = argv;
	wl.argc = 1;
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--expect"))
			wl.expect = 1;
		else if (!strcmp(argv[i], "--baseline"))
			wl.baseline = 1;
		else if (!strcmp(argv[i], "--check"))
			wl.check = 1;
		else if (!strcmp(argv[i], "-o") && i + 1 < argc)
			wl.dump = argv[++i];
		else if (!strcmp(argv[i], "-x") && i + 1 < argc)
			wl.status = atoi(argv[++i]);
		else
			argv[wl.argc++] = argv[i];
	}
	wl.vmas = wl_vmas();
	if (wl.baseline)
		wl_finish();
}

/* The calls, counted; each ends the program if it fails. */
static inline char *wl_mmap(char *at, long pages, int prot, int flags, int fd, long pgoff)
{
	char *got = mmap(at, pages * wl.page, prot, flags, fd, pgoff * wl.page);

	want.mmap++;
	if (got == MAP_FAILED)
		wl_die("mmap");
	return got;
}

/* Anonymous, private, without accounting (so that VM_ACCOUNT never tells two pieces apart). */
static inline char *wl_anon(char *at, long pages, int prot)
{
	return wl_mmap(at, pages, prot, ANON | MAP_FIXED_NOREPLACE, -1, 0);
}

static inline void wl_munmap(char *at, long pages)
{
	want.munmap++;
	if (munmap(at, pages * wl.page))
		wl_die("munmap");
}

static inline void wl_mprotect(char *at, long pages, int prot)
{
	want.mprotect++;
	if (mprotect(at, pages * wl.page, prot))
		wl_die("mprotect");
}

static inline void wl_madvise(char *at, long pages, int advice)
{
	want.madvise++;
	if (madvise(at, pages * wl.page, advice))
		wl_die("madvise");
}

static inline char *wl_mremap(char *at, long old_pages, long new_pages, int flags, char *to)
{
	char *got = mremap(at, old_pages * wl.page, new_pages * wl.page, flags, to);

	want.mremap++;
	if (got == MAP_FAILED)
		wl_die("mremap");
	return got;
}

/*
 * Finds free room for `pages` pages with at least one free page on either side: one mapping that
 * goes again at once (1 new, 1 unmap). Maps made in it stand alone until the workload says so.
 */
static inline char *wl_room(long pages)
{
	char *at = wl_mmap(NULL, pages + 2, PROT_NONE, ANON, -1, 0);

	want.fresh++;
	wl_munmap(at, pages + 2);
	want.unmap++;
	wl_check("room");
	return at + wl.page;
}

/* Unmaps a range that holds exactly `objects` whole VMAs and cuts none. */
static inline void wl_clear(char *at, long pages, long objects)
{
	wl_munmap(at, pages);
	want.unmap += objects;
	wl_check("clear");
}

#endif
