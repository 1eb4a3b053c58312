/*
 * Starting a VMM as the boot plan says, and talking to its monitor.
 */
#ifndef MEMCONSOLE_STARTER_H
#define MEMCONSOLE_STARTER_H

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bootplan.h"
#include "faultpoint.h"
#include "marks.h"
#include "patience.h"
#include "proctext.h"
#include "starter_files.h"

#define OUT_OF_THE_WAY 1100	/* above every number a VMM's fds may have */
#define ANSWER_MAX 65536
#define GO_ON "\"cont\""	/* in the line after which a VMM's vCPUs run */

enum guest_state { GUEST_HELD, GUEST_STARTED, GUEST_RESUMED };

struct guest {
	const struct plan_start *start;
	const struct plan_say *say;	/* NULL: it goes on by itself */
	const struct plan *plan;	/* which has its files */
	enum guest_state state;
	pid_t pid;			/* 0: not started */
	uint64_t start_ticks;
	int pidfd;			/* of one that an earlier start of this program left; else -1 */
	const char *keeper;		/* the path of the keeper's socket; NULL: there is none */
	bool told;			/* it was told to go on: what it was told before is behind it */
	struct moment at;		/* when it was started, or its monitor said the last of what was awaited */
	char why[256];			/* what is wrong with it */
	pthread_t thread;
	struct patience patience;	/* with its monitor */
};

/* Field 22 of /proc/PID/stat: when a process began, in clock ticks since boot; 0 if it is gone. */
static uint64_t start_ticks(pid_t pid)
{
	char path[64], text[1024], *at;
	unsigned long long ticks = 0;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	if (!proc_text(path, text, sizeof(text)))
		return 0;
	at = strrchr(text, ')');
	if (!at || sscanf(at + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
			  &ticks) != 1)
		return 0;
	return ticks;
}

/* In the child: become the VMM, with a mark that it did. Returns the errno of what cannot be done. */
static int become(const struct plan_start *s, const int *fds, int log, int keeper, bool may_run)
{
	struct mark mark = { .pid = (uint32_t)getpid(), .may_run = may_run, .start_ticks = start_ticks(getpid()) };
	int high[PLAN_FDS_MAX], null = open("/dev/null", O_RDONLY | O_CLOEXEC), err;
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	if (keeper >= 0)
		keeper = fcntl(keeper, F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
	for (int i = 0; i < s->nr_fds; i++) {
		high[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
		if (high[i] < 0)
			return errno;
	}
	if (null < 0 || dup2(null, 0) < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0)
		return errno;
	for (int i = 0; i < s->nr_fds; i++)
		if (dup2(high[i], (int)s->fds[i].number) < 0)
			return errno;
	if (chdir(s->directory) < 0)
		return errno;
	if ((s->uid || s->gid) && (setgroups(s->nr_groups, s->groups) || setgid(s->gid) || setuid(s->uid)))
		return errno;
	mark.at = moment_now();
	if (keeper >= 0 && mark_put(keeper, s->guest, &mark) != OK)
		return ENOLCK;		/* without a mark it could be started twice */
	execvpe(s->words[0], s->words, s->nr_variables ? s->variables : environ);
	err = errno;
	if (keeper >= 0)
		mark_drop(keeper, s->guest);
	return err;
}

/* Whether a file of the plan is of a guest, and says who runs it. */
static bool tells_of(const struct plan_file *f, const struct guest *g)
{
	return !f->early && strcmp(f->guest, g->start->guest) == 0;
}

/* Whether somebody else runs a guest, or may: there is a file that says so, or what must not be there. Says it in why. */
static bool guest_others(struct guest *g, bool files)
{
	for (size_t i = 0; files && i < g->plan->nr_files; i++) {
		const struct plan_file *f = &g->plan->files[i];

		if (tells_of(f, g) && access(f->path, F_OK) == 0) {
			snprintf(g->why, sizeof(g->why), "%.150s is there: somebody else runs it", f->path);
			return true;
		}
	}
	for (char **at = g->start->unless; at && *at; at++)
		if (access(*at, F_OK) == 0) {
			snprintf(g->why, sizeof(g->why), "%.150s is there: who may run it has started already", *at);
			return true;
		}
	return false;
}

/* Say in files who runs a guest. Returns 0, or -1 and why. */
static int guest_files(struct guest *g, bool early)
{
	for (size_t i = 0; i < g->plan->nr_files; i++) {
		const struct plan_file *f = &g->plan->files[i];
		int err = 0;

		if (strcmp(f->guest, g->start->guest) == 0 && early == (bool)f->early)
			err = put_file(f, g->pid);
		if (err) {
			snprintf(g->why, sizeof(g->why), "%.150s cannot be written: %s", f->path, strerror(err));
			return -1;
		}
	}
	return 0;
}

/* Take back what was said of a guest that does not go on. Returns whether anything could have been. */
static bool guest_untold(const struct guest *g)
{
	bool any = false;

	for (size_t i = 0; i < g->plan->nr_files; i++)
		if (tells_of(&g->plan->files[i], g)) {
			unlink(g->plan->files[i].path);
			any = true;
		}
	return any;
}

/* What a VMM needs besides its own directory. Returns 0, or -1 and why. */
static int guest_places(struct guest *g)
{
	const struct plan_start *s = g->start;

	for (char **at = s->directories; at && *at; at++) {
		int err = -make_directory(*at, 0755);

		if (!err && chown(*at, s->uid, s->gid))
			err = errno;
		if (err) {
			snprintf(g->why, sizeof(g->why), "its directory %.120s cannot be made: %s", *at, strerror(err));
			return -1;
		}
	}
	return guest_files(g, true);
}

/*
 * A guest whose VMM an earlier start of this program started. One that goes on by itself, or was told to, is left alone,
 * whatever became of it; one that has only waited is ended. Returns whether that is all.
 */
static bool guest_found(struct guest *g, int keeper)
{
	struct mark mark;
	int pidfd = keeper < 0 ? -1 : mark_get(keeper, g->start->guest, &mark);

	if (pidfd < 0)
		return false;
	if (!mark.may_run) {
		guest_untold(g);
		if (!mark_kill(pidfd, &mark))
			snprintf(g->why, sizeof(g->why), "its VMM, process %u, still waits for its state and cannot be killed", mark.pid);
		else
			mark_drop(keeper, g->start->guest);
		close(pidfd);
		return g->why[0];
	}
	if (mark_ended(pidfd)) {
		snprintf(g->why, sizeof(g->why), "its VMM has ended; see %s", g->start->log);
		g->told = true;
		close(pidfd);
		return true;
	}
	*g = (struct guest){ .start = g->start, .say = g->say, .plan = g->plan, .state = GUEST_STARTED, .pid = (pid_t)mark.pid,
			     .start_ticks = mark.start_ticks, .pidfd = pidfd, .keeper = g->keeper, .told = true,
			     .at = mark.at };
	return true;
}

/*
 * Start a guest's VMM with these fds, in the plan's order. Returns 0 with pid and start_ticks filled, or -1 and why; no
 * process is left then.
 */
static int guest_start(struct guest *g, const int *fds, int keeper)
{
	const struct plan_start *s = g->start;
	int err = make_directory(s->directory, 0755), ends[2], log, pipe_end;
	ssize_t got;

	if (err) {
		snprintf(g->why, sizeof(g->why), "its directory %.120s cannot be made: %s", s->directory, strerror(-err));
		return -1;
	}
	if (guest_places(g))
		return -1;
	log = open(s->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (log < 0) {
		snprintf(g->why, sizeof(g->why), "its log %.120s cannot be opened: %s", s->log, strerror(errno));
		return -1;
	}
	if ((s->uid || s->gid) && (fchown(log, s->uid, s->gid) || chown(s->directory, s->uid, s->gid))) {
		snprintf(g->why, sizeof(g->why), "its directory %.100s cannot be given to user %u: %s", s->directory,
			 (unsigned int)s->uid, strerror(errno));
		close(log);
		return -1;
	}
	if (pipe2(ends, O_CLOEXEC) < 0) {
		snprintf(g->why, sizeof(g->why), "no pipe can be made to start its VMM: %s", strerror(errno));
		close(log);
		return -1;
	}
	g->pid = fork();
	if (!g->pid) {
		pipe_end = fcntl(ends[1], F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
		err = become(s, fds, log, keeper, !g->say);
		_exit(write(pipe_end, &err, sizeof(err)) == sizeof(err) ? 127 : 126);
	}
	err = g->pid < 0 ? errno : 0;
	close(ends[1]);
	close(log);
	got = err ? 0 : read(ends[0], &err, sizeof(err));
	close(ends[0]);
	if (err || got) {
		snprintf(g->why, sizeof(g->why), "its VMM %.120s cannot be started: %s", s->words[0],
			 err == ENOLCK ? "custody takes no note that it starts" : strerror(err));
		if (g->pid > 0)
			waitpid(g->pid, NULL, 0);
		g->pid = 0;
		return -1;
	}
	g->start_ticks = start_ticks(g->pid);
	g->state = GUEST_STARTED;
	g->at = moment_now();
	return 0;
}

/* Whether a guest's process has ended; then it is held again, and why says with what. */
static bool guest_ended(struct guest *g)
{
	int status;

	if (g->pid && g->pidfd >= 0) {
		if (!mark_ended(g->pidfd))
			return false;
		snprintf(g->why, sizeof(g->why), "its VMM has ended; see %s", g->start->log);
		g->pid = 0;
		g->state = GUEST_HELD;
		return true;
	}
	if (!g->pid || waitpid(g->pid, &status, WNOHANG) != g->pid)
		return false;
	snprintf(g->why, sizeof(g->why), WIFSIGNALED(status) ? "its VMM was killed by signal %d; see %s"
							     : "its VMM ended with status %d; see %s",
		 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), g->start->log);
	g->pid = 0;
	g->state = GUEST_HELD;
	return true;
}

/* Connect to a monitor that may not be there yet. Returns a socket, or -1 and why. */
static int monitor_connect(struct guest *g)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };

	if (strlen(g->say->socket) >= sizeof(to.sun_path)) {
		snprintf(g->why, sizeof(g->why), "the path of its monitor is too long");
		return -1;
	}
	strcpy(to.sun_path, g->say->socket);
	while (!guest_ended(g)) {
		int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

		if (sock >= 0 && connect(sock, (struct sockaddr *)&to, sizeof(to)) == 0)
			return sock;
		snprintf(g->why, sizeof(g->why), "its monitor cannot be reached: %s", strerror(errno));
		if (sock >= 0)
			close(sock);
		if (!patience_left(&g->patience))
			break;
		wait_ns(AGAIN_NS);
	}
	return -1;
}

static int monitor_silent(struct guest *g)
{
	snprintf(g->why, sizeof(g->why), "its monitor does not answer within %u ms", g->say->within_ms);
	return -1;
}

/* The next line a monitor says, without its end, in ``line``. Returns 0, or -1 and why. */
static int monitor_hear(struct guest *g, int sock, char *line)
{
	size_t used = 0;

	while (used < ANSWER_MAX - 1) {
		ssize_t got;

		if (!patience_poll(&g->patience, sock))
			return monitor_silent(g);
		got = read(sock, line + used, 1);	/* a line at a time: what follows is another answer */
		if (got <= 0) {
			snprintf(g->why, sizeof(g->why), "its monitor went away");
			return -1;
		}
		if (line[used] == '\n') {
			line[used] = 0;
			return 0;
		}
		used++;
	}
	snprintf(g->why, sizeof(g->why), "its monitor says more than a line may hold");
	return -1;
}

static int monitor_tell(struct guest *g, int sock, const char *text)
{
	size_t left = strlen(text);

	while (left) {
		ssize_t n = send(sock, text, left, MSG_NOSIGNAL);

		if (n <= 0) {
			snprintf(g->why, sizeof(g->why), "its monitor cannot be told anything: %s", strerror(errno));
			return -1;
		}
		text += n;
		left -= (size_t)n;
	}
	return 0;
}

/* Say a line until what is returned contains what is awaited. Returns 0, or -1 and why. */
static int monitor_ask(struct guest *g, int sock, const struct plan_line *l, char *line)
{
	for (;;) {
		if (monitor_tell(g, sock, l->line) || monitor_tell(g, sock, "\n"))
			return -1;
		do
			if (monitor_hear(g, sock, line))
				return -1;
		while (strncmp(line, "{\"return\"", 9) && strncmp(line, "{\"error\"", 8));
		if (line[2] == 'e') {
			snprintf(g->why, sizeof(g->why), "its monitor answers %.100s with %.120s", l->line, line);
			return -1;
		}
		if (strstr(line, l->until))
			return 0;
		if (!patience_left(&g->patience))
			return monitor_silent(g);
		wait_ns(AGAIN_NS);
	}
}

/* Say in custody that a guest is told to go on; only then it is. Returns 0, or -1 and why. */
static int guest_told(struct guest *g)
{
	struct mark mark = { .pid = (uint32_t)g->pid, .may_run = 1, .start_ticks = g->start_ticks, .at = moment_now() };
	int keeper, code;

	if (g->told || !g->keeper)
		return 0;
	keeper = keeper_connect(g->keeper);	/* a connection has one request at a time, and this is a thread */
	code = keeper < 0 ? keeper : mark_put(keeper, g->start->guest, &mark);
	if (keeper >= 0)
		close(keeper);
	g->told = true;
	if (code == OK)
		return 0;
	snprintf(g->why, sizeof(g->why), "custody takes no note that it goes on (code %d)", code);
	return -1;
}

/* Have whoever looks know who runs a guest, unless somebody else came first. Returns 0, or -1 and why. */
static int guest_shown(struct guest *g)
{
	if (g->told)
		return 0;
	if (guest_files(g, false))
		return -1;
	point("files", g->start->guest, "written");
	return guest_others(g, false) ? -1 : 0;
}

/* One that does not go on, and that somebody else starts then. */
static void guest_dismiss(struct guest *g)
{
	int status = 0;

	if (g->told || !g->pid || !guest_untold(g))
		return;
	kill(g->pid, SIGKILL);
	if (waitpid(g->pid, &status, 0) == g->pid && WIFEXITED(status))
		snprintf(g->why, sizeof(g->why), "its VMM ended with status %d; see %s", WEXITSTATUS(status), g->start->log);
	g->pid = 0;
	g->state = GUEST_HELD;
}

/* The thread of a guest with a monitor: all of the conversation, or what is left of it for one that was told to go on. */
static void *guest_converse(void *argument)
{
	struct guest *g = argument;
	bool behind = g->told;
	char *line = malloc(ANSWER_MAX);
	int sock, err;

	patience_begin(&g->patience, g->pid, g->say->within_ms);
	sock = monitor_connect(g);
	err = sock < 0;
	if (!err)
		err = !line || monitor_hear(g, sock, line);	/* the greeting */
	for (uint16_t i = 0; !err && i < g->say->nr_lines; i++) {
		const struct plan_line *l = &g->say->lines[i];
		char number[8];

		if (strstr(l->line, GO_ON)) {
			err = guest_shown(g) || guest_told(g);
			behind = false;
		}
		if (err || (behind && i))	/* the first is the greeting of a connection */
			continue;
		err = monitor_ask(g, sock, l, line);
		snprintf(number, sizeof(number), "%u", i);
		point("say", g->start->guest, number);
	}
	if (!err) {
		g->why[0] = 0;
		g->state = GUEST_RESUMED;
		g->at = moment_now();
	} else if (!guest_ended(g) && !g->why[0]) {
		snprintf(g->why, sizeof(g->why), "its monitor cannot be talked to");
	}
	if (err)
		guest_dismiss(g);
	if (sock >= 0)
		close(sock);
	free(line);
	return NULL;
}

#endif
