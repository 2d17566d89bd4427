//! Defects that can be planted into a node, for the tests that must find them. Never compiled into
//! a node that is used: only the feature `faults` has them.

#[cfg(feature = "faults")]
pub(crate) use planting::Fault;

/// `true` when one of the defects is planted; constant `false` in a build that cannot plant any.
macro_rules! planted {
    ($($fault:ident)|+) => {{
        #[cfg(feature = "faults")]
        {
            let planted = $crate::fault::Fault::planted();
            false $(|| planted == Some($crate::fault::Fault::$fault))+
        }
        #[cfg(not(feature = "faults"))]
        {
            false
        }
    }};
}
pub(crate) use planted;

#[cfg(feature = "faults")]
mod planting {
    use std::sync::OnceLock;

    /// Names the defect that a process has from its start on.
    const VARIABLE: &str = "UNBROKEN_FAULT";

    /// Defects that whole-system tests must find.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Fault {
        /// `no-fence`: frames leave whatever the lease says; neither node nor kernel checks.
        NoFence,
        /// `no-kernel-fence`: only the node checks.
        NoKernelFence,
        /// `answers-unjudged`: a backup does not compare its server's answers with the leader's.
        AnswersUnjudged,
        /// `outvoted-leads`: a leader goes on although two others contradict it.
        OutvotedLeads,
    }

    impl Fault {
        /// The defect of this process.
        ///
        /// # Panics
        /// If the environment names one that does not exist: a test would pass for nothing.
        pub(crate) fn planted() -> Option<Self> {
            static PLANTED: OnceLock<Option<Fault>> = OnceLock::new();
            *PLANTED.get_or_init(|| {
                let name = std::env::var(VARIABLE).ok()?;
                Some(match name.as_str() {
                    "no-fence" => Self::NoFence,
                    "no-kernel-fence" => Self::NoKernelFence,
                    "answers-unjudged" => Self::AnswersUnjudged,
                    "outvoted-leads" => Self::OutvotedLeads,
                    _ => panic!("{VARIABLE}={name}: no such defect"),
                })
            })
        }
    }
}
