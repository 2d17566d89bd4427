//! What may be a znode's path: ZooKeeper's `PathUtils.validatePath`.

use thiserror::Error;

/// Longest path, in bytes. ZooKeeper has no such bound besides the frame's.
pub const PATH_BYTES_MAX: usize = 16 * 1024;

/// Deepest znode: the names in its path. What looks upwards from a znode looks at as many others.
/// ZooKeeper has no such bound.
pub const PATH_NAMES_MAX: usize = 1024;

/// Why a path is not valid. A server answers [`super::ErrorCode::BadArguments`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PathError {
    /// It does not begin with a slash.
    #[error("a path begins with /")]
    NotAbsolute,
    /// It ends with a slash and is not the root.
    #[error("a path does not end with /")]
    TrailingSlash,
    /// Two slashes follow each other.
    #[error("a path has no empty names (//)")]
    EmptyName,
    /// A name is `.` or `..`.
    #[error("a path has no relative names (. or ..)")]
    RelativeName,
    /// A control character, surrogate (so anything beyond U+FFFF), private or special character.
    #[error("character U+{0:04X} is not allowed in a path")]
    BadCharacter(u32),
    /// It has more than [`PATH_BYTES_MAX`] bytes.
    #[error("a path has at most {PATH_BYTES_MAX} bytes, not {0}")]
    TooLong(usize),
    /// It has more than [`PATH_NAMES_MAX`] names.
    #[error("a path has at most {PATH_NAMES_MAX} names")]
    TooDeep,
}

/// Checks a path. For a sequential create, check the path with the counter appended: `/a/` is
/// then allowed, as a name that is a counter alone.
///
/// # Errors
/// [`PathError`] at the first thing that is wrong.
pub fn validate_path(path: &str) -> Result<(), PathError> {
    if path.len() > PATH_BYTES_MAX {
        return Err(PathError::TooLong(path.len()));
    }
    let Some(names) = path.strip_prefix('/') else {
        return Err(PathError::NotAbsolute);
    };
    if names.is_empty() {
        return Ok(());
    }
    if names.ends_with('/') {
        return Err(PathError::TrailingSlash);
    }
    for (depth, name) in names.split('/').enumerate() {
        if depth == PATH_NAMES_MAX {
            return Err(PathError::TooDeep);
        }
        match name {
            "" => return Err(PathError::EmptyName),
            "." | ".." => return Err(PathError::RelativeName),
            _ => {}
        }
        if let Some(c) = name.chars().find(|&c| !is_allowed(c)) {
            return Err(PathError::BadCharacter(u32::from(c)));
        }
    }
    Ok(())
}

/// ZooKeeper judges UTF-16 units: a character beyond U+FFFF is two surrogates there, and refused.
const fn is_allowed(c: char) -> bool {
    !matches!(
        c,
        '\0'..='\u{1f}'
            | '\u{7f}'..='\u{9f}'
            | '\u{e000}'..='\u{f8ff}'
            | '\u{fff0}'..='\u{ffff}'
            | '\u{10000}'..
    )
}

/// Splits a valid path into its parent and its name; `None` for the root.
pub fn parent(path: &str) -> Option<(&str, &str)> {
    let (parent, name) = path.rsplit_once('/')?;
    match (parent, name) {
        (_, "") => None,
        ("", name) => Some(("/", name)),
        (parent, name) => Some((parent, name)),
    }
}
