/*
 * A vCPU that stands at the end of a beat, taken out of one machine and put into another.
 */
#ifndef MEMCONSOLE_CANARY_VCPU_H
#define MEMCONSOLE_CANARY_VCPU_H

#include "canary_kvm.h"

#if defined(__x86_64__)

#define VCPU_MSRS 12

struct vcpu {
	uint32_t parts;		/* bits of those that this KVM has, in the order of vcpu_parts */
	uint32_t msrs;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	struct kvm_xcrs xcrs;
	struct kvm_xsave xsave;
	struct kvm_debugregs debugregs;
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp_state;
	uint32_t zero;
	struct kvm_msr_entry msr[VCPU_MSRS];
};

static const struct {
	unsigned long get, set;
	size_t at;
	bool needed;
	const char *name;
} vcpu_parts[] = {
	{ KVM_GET_SREGS, KVM_SET_SREGS, offsetof(struct vcpu, sregs), true, "SREGS" },
	{ KVM_GET_REGS, KVM_SET_REGS, offsetof(struct vcpu, regs), true, "REGS" },
	{ KVM_GET_XCRS, KVM_SET_XCRS, offsetof(struct vcpu, xcrs), false, "XCRS" },
	{ KVM_GET_XSAVE, KVM_SET_XSAVE, offsetof(struct vcpu, xsave), false, "XSAVE" },
	{ KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, offsetof(struct vcpu, debugregs), false, "DEBUGREGS" },
	{ KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, offsetof(struct vcpu, events), false, "VCPU_EVENTS" },
	{ KVM_GET_MP_STATE, KVM_SET_MP_STATE, offsetof(struct vcpu, mp_state), false, "MP_STATE" },
};

#define VCPU_PARTS (sizeof(vcpu_parts) / sizeof(vcpu_parts[0]))

/* Its time stamp counter, and what its system calls, page attributes and segments come from. */
static const uint32_t vcpu_msrs[VCPU_MSRS] = {
	0x10, 0x174, 0x175, 0x176, 0x1a0, 0x277, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000102, 0xc0000103,
};

struct one_msr {
	struct kvm_msrs head;
	struct kvm_msr_entry entry;
};

/**
 * vcpu_save() - what a vCPU is, at the end of a beat
 * @why: told which part the kernel did not give; @size bytes
 *
 * Return: 0, or -errno of the ioctl.
 */
static int vcpu_save(struct vm *vm, struct vcpu *state, char *why, size_t size)
{
	/* The OUT that ended the beat is only over, and RIP behind it, when the vCPU was entered once more. */
	vm->run->immediate_exit = 1;
	if (ioctl(vm->vcpu, KVM_RUN, 0) < 0 && errno != EINTR) {
		snprintf(why, size, "KVM_RUN: %s", strerror(errno));
		return -errno;
	}
	vm->run->immediate_exit = 0;
	*state = (struct vcpu){ 0 };
	for (size_t i = 0; i < VCPU_PARTS; i++) {
		if (ioctl(vm->vcpu, vcpu_parts[i].get, (char *)state + vcpu_parts[i].at) == 0) {
			state->parts |= 1u << i;
		} else if (vcpu_parts[i].needed || (errno != EINVAL && errno != ENOTTY)) {
			snprintf(why, size, "KVM_GET_%s: %s", vcpu_parts[i].name, strerror(errno));
			return -errno;
		}
	}
	for (size_t i = 0; i < VCPU_MSRS; i++) {
		struct one_msr msr = { .head.nmsrs = 1, .entry.index = vcpu_msrs[i] };

		/* one a time: the call ends at the first this processor lacks */
		if (ioctl(vm->vcpu, KVM_GET_MSRS, &msr) == 1)
			state->msr[state->msrs++] = msr.entry;
	}
	return 0;
}

/**
 * vcpu_load() - make a new machine's vCPU what another one was
 * @why: told which part the kernel did not take; @size bytes
 *
 * Return: 0, or -errno of the ioctl; the vCPU must not run then.
 */
static int vcpu_load(struct vm *vm, const struct vcpu *state, char *why, size_t size)
{
	for (size_t i = 0; i < VCPU_PARTS; i++) {
		if (!(state->parts >> i & 1))
			continue;
		if (ioctl(vm->vcpu, vcpu_parts[i].set, (const char *)state + vcpu_parts[i].at) < 0) {
			snprintf(why, size, "KVM_SET_%s: %s", vcpu_parts[i].name, strerror(errno));
			return -errno;
		}
	}
	for (uint32_t i = 0; i < state->msrs && i < VCPU_MSRS; i++) {
		struct one_msr msr = { .head.nmsrs = 1, .entry = state->msr[i] };

		if (ioctl(vm->vcpu, KVM_SET_MSRS, &msr) != 1) {
			snprintf(why, size, "KVM_SET_MSRS: 0x%x: %s", state->msr[i].index, strerror(errno));
			return errno ? -errno : -EINVAL;
		}
	}
	return 0;
}

#else

struct vcpu {
	uint32_t parts;
};

static int vcpu_save(struct vm *vm, struct vcpu *state, char *why, size_t size)
{
	(void)vm, (void)state;
	snprintf(why, size, "no vCPU for this processor");
	return -ENOSYS;
}

static int vcpu_load(struct vm *vm, const struct vcpu *state, char *why, size_t size)
{
	(void)vm, (void)state;
	snprintf(why, size, "no vCPU for this processor");
	return -ENOSYS;
}

#endif
#endif
