// The threads of the kernels.
//
// On an idle machine they are those of PyTorch's OpenMP pool: a team of our own beside it would find its core taken by
// a thread of that pool that still spins, whenever our ops alternate with PyTorch's (conv, add, linear, softmax of 100
// us each: 0.75x; Zen 4). OpenMP ends each parallel region with a barrier, though, at which everyone waits for a thread
// that the system has stopped in favour of another program. So the threads measure how long they were ready to run and
// did not (Contention), and while others want the processor, a team of our own (OwnTeam) does the work. Its lead waits
// for nobody who has not claimed a piece of work, threads that wait soon sleep, and PyTorch's own ops are made to
// (ShortWaits).
#pragma once

#include "../kernels/common/parallel.h"

namespace fastops {

// A team of torch.get_num_threads() threads. Inside another parallel region it has one thread. So it has in a forked
// child, where libgomp's pool no longer exists and waking it would hang (GCC bug 60035).
Team torch_team();

enum class TeamChoice { automatic, openmp, own };
const char* team_name(TeamChoice choice);
// FASTOPS_TEAM, or what was set since, as tests and measurements do.
TeamChoice team_choice();
void set_team_choice(TeamChoice choice);
// Whether the own team is what would run now.
bool own_team_in_use();

}  // namespace fastops
