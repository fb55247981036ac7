//! Where a backend comes from, as a configuration says it. A machine opens it. Runs on the thread
//! that builds the machine.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::backend::NetBackend;
use super::datagram::DatagramSocket;
use super::socket::Peer;
use super::stream::StreamSocket;
use super::switch::{Network, Port, PortBackend, QueueLimit};
use super::tap::Tap;
use super::user::{UserBackend, UserNetConfig};
use crate::error::Result;

/// See the module. A descriptor belongs to the backend.
#[derive(Debug)]
pub enum NetSource {
    /// A tap interface by its name.
    Tap(String),
    /// An open tap interface.
    TapFd(OwnedFd),
    /// A stream socket that is to be connected.
    Stream(Peer),
    /// A connected stream socket.
    StreamFd(OwnedFd),
    /// A datagram socket at an address of its own, if there is one, that is to be connected.
    Datagram(Option<Peer>, Peer),
    /// A connected datagram socket.
    DatagramFd(OwnedFd),
    /// A port of a network inside the process.
    Port(Arc<Port>),
    /// A new port of such a network.
    Network(Arc<Network>),
    /// A user network.
    User(Box<UserNetConfig>),
    /// A backend that exists.
    Made(Arc<dyn NetBackend>),
}

impl NetSource {
    /// The backend.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(self) -> Result<Arc<dyn NetBackend>> {
        Ok(match self {
            Self::Tap(name) => Tap::open(&name)?,
            Self::TapFd(fd) => Tap::new(fd)?,
            Self::Stream(peer) => StreamSocket::connect(&peer)?,
            Self::StreamFd(fd) => StreamSocket::new(fd)?,
            Self::Datagram(own, peer) => DatagramSocket::connect(own.as_ref(), &peer)?,
            Self::DatagramFd(fd) => DatagramSocket::new(fd)?,
            Self::Port(port) => Arc::new(PortBackend::new(port)?),
            Self::Network(network) => {
                Arc::new(PortBackend::new(network.port(None, QueueLimit::default())?)?)
            }
            Self::User(config) => Arc::new(UserBackend::new(*config)?),
            Self::Made(backend) => backend,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Disconnected;
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn each_source_opens_its_backend() {
        let (stream, _peer) = UnixStream::pair().unwrap();
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        for (source, name) in [
            (NetSource::StreamFd(stream.into()), "stream socket"),
            (NetSource::DatagramFd(datagram.into()), "datagram socket"),
            (NetSource::Made(Arc::new(Disconnected)), "none"),
            (NetSource::User(Box::default()), "user"),
            (NetSource::Network(Network::new(1)), "network port"),
        ] {
            assert!(source.open().unwrap().describe().starts_with(name));
        }
        assert!(NetSource::Tap(String::new()).open().is_err());
        assert!(NetSource::Stream(Peer::Path("/nonexistent".into())).open().is_err());
    }
}
