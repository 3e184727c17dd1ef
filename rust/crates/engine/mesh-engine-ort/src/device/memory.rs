//! Memory of a device: an account of what stages keep there, a limit on it, and the texts by which a provider
//! says that it has no more.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The account of one model's memory on a device: weights and KV cache. Activations are the provider's own and
/// are not in it. Clones are the same account.
///
/// Everything that a [`DeviceStage`](crate::DeviceStage) keeps on its device is reserved here first, so a limit
/// holds before the device is asked. KV caches grow after the load: an account is promised what it may take, so
/// that the plan of another model leaves it alone.
#[derive(Debug, Clone, Default)]
pub struct DeviceMemory {
    limit: Option<u64>,
    own: Arc<Account>,
    /// All accounts under the limit; those of models that are gone are empty.
    all: Arc<Mutex<Vec<Arc<Account>>>>,
}

#[derive(Debug, Default)]
struct Account {
    used: AtomicU64,
    promised: AtomicU64,
    exhausted: AtomicBool,
}

impl Account {
    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that are not for others.
    fn taken(&self) -> u64 {
        self.used().max(self.promised.load(Ordering::Relaxed))
    }
}

impl DeviceMemory {
    /// An empty account with a limit in bytes; `None` is no limit.
    pub fn new(limit: Option<u64>) -> DeviceMemory {
        DeviceMemory {
            limit,
            ..DeviceMemory::default()
        }
    }

    /// An empty account for another model under the same limit.
    pub fn another(&self) -> DeviceMemory {
        DeviceMemory {
            limit: self.limit,
            own: Arc::default(),
            all: Arc::clone(&self.all),
        }
    }

    /// Bytes that this account holds.
    pub fn used(&self) -> u64 {
        self.own.used()
    }

    /// Bytes that the limit leaves to this account; `None` without a limit.
    pub fn left(&self) -> Option<u64> {
        let others = self.others(&self.accounts(), Account::taken);
        let taken = others.saturating_add(self.used());
        self.limit.map(|limit| limit.saturating_sub(taken))
    }

    /// Bytes that are promised to other accounts and that they do not hold yet.
    pub(crate) fn promised_to_others(&self) -> u64 {
        let outstanding = |account: &Account| account.taken().saturating_sub(account.used());
        self.others(&self.accounts(), outstanding)
    }

    /// Keeps others from planning with so many bytes, those that this account holds among them. It ends when
    /// the account holds nothing.
    pub(crate) fn promise(&self, bytes: u64) {
        self.own.promised.store(bytes, Ordering::Relaxed);
    }

    /// True if so many more bytes are more than was promised.
    pub(crate) fn exceeds_promise(&self, more: u64) -> bool {
        let promised = self.own.promised.load(Ordering::Relaxed);
        promised > 0 && self.used().saturating_add(more) > promised
    }

    /// True once an allocation of a loaded stage failed.
    pub fn is_exhausted(&self) -> bool {
        self.own.exhausted.load(Ordering::Relaxed)
    }

    pub(crate) fn set_exhausted(&self, exhausted: bool) {
        self.own.exhausted.store(exhausted, Ordering::Relaxed);
    }

    /// Enters `bytes` in the account until the result is dropped.
    ///
    /// # Errors
    /// If the limit leaves less.
    pub(crate) fn reserve(&self, bytes: u64, purpose: &'static str) -> Result<Reserved, Full> {
        let mut accounts = self.accounts();
        let others = self.others(&accounts, Account::taken);
        let used = self.used();
        let limit = self.limit.unwrap_or(u64::MAX);
        let left = limit.saturating_sub(others).saturating_sub(used);
        if bytes > left {
            return Err(Full {
                purpose,
                bytes,
                left,
                limit,
            });
        }
        if !accounts
            .iter()
            .any(|account| Arc::ptr_eq(account, &self.own))
        {
            accounts.retain(|account| account.taken() > 0);
            accounts.push(Arc::clone(&self.own));
        }
        // Under the lock, so that nobody else takes the same bytes.
        self.own.used.store(used + bytes, Ordering::Relaxed);
        Ok(Reserved {
            memory: self.clone(),
            bytes,
        })
    }

    fn accounts(&self) -> MutexGuard<'_, Vec<Arc<Account>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn others(&self, accounts: &[Arc<Account>], bytes: impl Fn(&Account) -> u64) -> u64 {
        let others = accounts
            .iter()
            .filter(|account| !Arc::ptr_eq(account, &self.own));
        others.fold(0, |sum: u64, account| sum.saturating_add(bytes(account)))
    }
}

/// Bytes in an account.
#[derive(Debug)]
pub(crate) struct Reserved {
    memory: DeviceMemory,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _accounts = self.memory.accounts();
        let own = &self.memory.own;
        let used = own.used().saturating_sub(self.bytes);
        own.used.store(used, Ordering::Relaxed);
        if used == 0 {
            own.promised.store(0, Ordering::Relaxed);
        }
    }
}

/// The limit leaves too little.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Full {
    purpose: &'static str,
    bytes: u64,
    left: u64,
    limit: u64,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Full {
            purpose,
            bytes,
            left,
            limit,
        } = self;
        write!(
            f,
            "{OWN}: {purpose} takes {bytes} bytes, and {left} of the limit of {limit} bytes are left"
        )
    }
}

impl From<Full> for ort::Error {
    fn from(full: Full) -> ort::Error {
        ort::Error::new(full.to_string())
    }
}

/// True if this is how our account, ONNX Runtime's arena or the library of a GPU says that it has no memory
/// left.
pub(crate) fn says_exhausted(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    SIGNS.iter().any(|sign| text.contains(sign))
}

const OWN: &str = "out of device memory";

/// In lower case. ONNX Runtime has no error code for it.
const SIGNS: [&str; 8] = [
    OWN,
    // CUDA and HIP: "failure 2: out of memory"; Vulkan through Dawn.
    "out of memory",
    "out_of_memory",
    "outofmemory",
    "out_of_device_memory",
    // cuBLAS, cuDNN.
    "status_alloc_failed",
    // ONNX Runtime's arena.
    "failed to allocate memory",
    "is smaller than requested bytes",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_over_all_accounts_and_memory_comes_back() {
        let one = DeviceMemory::new(Some(100));
        let other = one.another();
        let weights = one.reserve(60, "weights").unwrap();
        let cache = other.reserve(30, "cache").unwrap();
        assert_eq!((one.used(), other.used(), one.left()), (60, 30, Some(10)));
        let full = other.reserve(11, "cache").unwrap_err();
        assert_eq!(
            full.to_string(),
            "out of device memory: cache takes 11 bytes, and 10 of the limit of 100 bytes are left"
        );
        assert!(says_exhausted(&full.to_string()));
        assert!(one.reserve(u64::MAX, "weights").is_err());
        drop(weights);
        assert_eq!((one.used(), other.left()), (0, Some(70)));
        drop(cache);
        assert_eq!(other.left(), Some(100));
        assert!(DeviceMemory::default().reserve(u64::MAX, "all").is_ok());
    }

    #[test]
    fn what_is_promised_to_a_model_is_left_alone_by_others() {
        let one = DeviceMemory::new(Some(100));
        let other = one.another();
        let weights = one.reserve(40, "weights").unwrap();
        one.promise(70);
        assert_eq!((one.left(), other.left()), (Some(60), Some(30)));
        assert_eq!(
            (one.promised_to_others(), other.promised_to_others()),
            (0, 30)
        );
        assert!(other.reserve(31, "weights").is_err());
        let small = other.reserve(30, "weights").unwrap();
        let cache = one.reserve(30, "cache").unwrap();
        assert!(one.reserve(1, "cache").is_err());
        drop((weights, cache));
        assert_eq!((other.left(), other.promised_to_others()), (Some(70), 0));
        drop(small);
    }

    #[test]
    fn providers_say_that_memory_ran_out_in_these_words() {
        for text in [
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=x",
            "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
            "HIP failure 2: hipErrorOutOfMemory",
            "Failed to allocate memory for requested buffer of size 1073741824",
            "Available memory of 1 is smaller than requested bytes of 256",
            "vkAllocateMemory failed with VK_ERROR_OUT_OF_DEVICE_MEMORY",
        ] {
            assert!(says_exhausted(text), "{text}");
        }
        for text in [
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
            "Failed to load library libonnxruntime_providers_cuda.so",
            "",
        ] {
            assert!(!says_exhausted(text), "{text}");
        }
    }
}
