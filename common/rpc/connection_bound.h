// Connections are refused before they use up the descriptors of the process.
//
// gRPC (1.51) has no bound on connections, and stops listening for good when it cannot accept one
// for want of descriptors: the process is deaf from then on, and its clients wait until their
// deadlines. It has no hook for that either. So accept4(), which all of its listeners call, is
// defined here, and a connection that would be given one of the last descriptors is closed at once:
// its client hears UNAVAILABLE, the log says why, and who is connected goes on.
#pragma once

namespace tandem {

// Raises the soft limit of descriptors to the hard one (1,024 is for programs that use select()),
// and keeps the last of them from connections. Once per process, before it listens.
void BoundConnections();

// How many descriptors connections may reach up to; 0 before BoundConnections().
int ConnectionBound();

// Warns where so few descriptors may be open that clients would soon be refused. For servers.
void WarnOfFewDescriptors();

}  // namespace tandem
