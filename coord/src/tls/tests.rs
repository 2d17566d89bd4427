//! Files that are wrong, subjects, and certificates that change.

use std::path::Path;

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

use super::*;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let pid = std::process::id();
        let dir = std::env::temp_dir().join(format!("unbroken-coord-tls-{pid}-{name}"));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A certificate that signs itself, and its key.
    fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let cert = params.self_signed(&key).unwrap();
        (
            self.write(&format!("{name}.pem"), &cert.pem()),
            self.write(&format!("{name}.key"), &key.serialize_pem()),
        )
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn said(result: Result<(), TlsError>) -> String {
    result.expect_err("it is wrong").to_string()
}

#[test]
fn errors_name_the_file_and_what_is_wrong_with_it() {
    let folder = Folder::new("errors");
    let (cert, key) = folder.pair("a");
    let (_, other) = folder.pair("b");
    let empty = folder.write("empty", "");
    let none = Path::new("/none/such");
    let good = ServerTls::new(&cert, &key);
    good.check().unwrap();
    let text = said(ServerTls::new(none, &key).check());
    assert!(text.starts_with("cert /none/such: No such file"), "{text}");
    let text = said(ServerTls::new(&cert, &empty).check());
    assert!(
        text.starts_with("key ") && text.ends_with("empty: holds no private key"),
        "{text}"
    );
    let text = said(ServerTls::new(&empty, &key).check());
    assert!(
        text.starts_with("cert ") && text.ends_with("empty: holds no certificate"),
        "{text}"
    );
    let text = said(ServerTls::new(&cert, &other).check());
    assert!(
        text.contains("a.pem and key") && text.contains("b.key"),
        "{text}"
    );
    let mut tls = good;
    tls.client_auth = ClientAuth::Request;
    assert!(said(tls.check()).starts_with("client_auth needs ca"));
    (tls.client_auth, tls.peers) = (ClientAuth::None, true);
    assert!(said(tls.check()).starts_with("peers needs ca"));
    tls.ca = Some(empty.clone());
    assert!(said(tls.check()).starts_with("ca "));
    tls.ca = Some(cert.clone());
    tls.check().unwrap();
    assert!(said(ClientTls::new(&empty).check()).starts_with("ca "));
    let text = said(ClientTls::new(&cert).server_name("not a name").check());
    assert!(text.starts_with("\"not a name\" is neither"), "{text}");
    ClientTls::new(&cert).identity(&cert, &key).check().unwrap();
}

#[test]
fn changed_files_are_read_again_and_unusable_ones_are_not() {
    let folder = Folder::new("reload");
    let (cert, key) = folder.pair("a");
    let tls = ServerTls::new(&cert, &key);
    let certificates = tls.load_for_clients().unwrap();
    let first = certificates.current().unwrap();
    certificates.look_again();
    assert!(Arc::ptr_eq(&first, &certificates.current().unwrap()));
    folder.write("a.pem", "rubbish");
    certificates.look_again();
    assert!(
        Arc::ptr_eq(&first, &certificates.current().unwrap()),
        "the old ones go on"
    );
    folder.pair("a");
    assert!(
        Arc::ptr_eq(&first, &certificates.current().unwrap()),
        "not looked at yet"
    );
    certificates.look_again();
    assert!(!Arc::ptr_eq(&first, &certificates.current().unwrap()));
}

fn certificate(parts: &[(DnType, &str)]) -> Vec<u8> {
    let mut params = CertificateParams::new(vec!["peer-1".to_owned()]).unwrap();
    params.distinguished_name = DistinguishedName::new();
    for (kind, value) in parts {
        params.distinguished_name.push(kind.clone(), *value);
    }
    let key = KeyPair::generate().unwrap();
    params.self_signed(&key).unwrap().der().to_vec()
}

#[test]
fn subjects_read_as_java_writes_them() {
    let parts = [
        (DnType::CountryName, "AT"),
        (DnType::OrganizationName, "Sons, Daughters + Co"),
        (DnType::OrganizationalUnitName, "#1 "),
        (DnType::CommonName, "me"),
    ];
    let expected = "CN=me,OU=\\#1\\ ,O=Sons\\, Daughters \\+ Co,C=AT";
    assert_eq!(subject(&certificate(&parts)).as_deref(), Some(expected));
    // emailAddress has no short name in RFC 2253.
    let mail = DnType::from_oid(&[1, 2, 840, 113_549, 1, 9, 1]);
    let read = subject(&certificate(&[(mail, "a@b")])).unwrap();
    assert_eq!(read, "1.2.840.113549.1.9.1=#0c03614062");
    assert_eq!(subject(&certificate(&[])).as_deref(), Some(""));
}

#[test]
fn what_is_no_certificate_has_no_subject_and_harms_nobody() {
    let whole = certificate(&[(DnType::CommonName, "me"), (DnType::CountryName, "AT")]);
    assert!(subject(&whole).is_some());
    for end in 0..whole.len() {
        assert_eq!(subject(&whole[..end]), None);
    }
    // Each byte that says how long something is may lie.
    for i in 0..whole.len().min(300) {
        for byte in [0, 0x7f, 0x80, 0x84, 0xff] {
            let mut bytes = whole.clone();
            bytes[i] = byte;
            let _ = subject(&bytes);
        }
    }
}

#[test]
fn a_certificate_names_its_peer() {
    let der = certificate(&[(DnType::CommonName, "other")]);
    let der = CertificateDer::from(der);
    assert!(names(&der, "peer-1"));
    assert!(!names(&der, "peer-2") && !names(&der, "other") && !names(&der, "no name"));
}
